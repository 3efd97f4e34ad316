// The Python binding: a thin ring around the program. Arrays stay owned by Python; every address handed
// over must outlive the program (gossamer.backends.cpu keeps them).
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <tuple>

#include "checksum.h"
#include "memory.h"
#include "probe.h"
#include "program.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace gossamer {
namespace {

using Bytes = nb::ndarray<uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Codes = nb::ndarray<const int8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Bytes2 = nb::ndarray<const uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Floats = nb::ndarray<const float, nb::c_contig, nb::device::cpu>;
using Ints = nb::ndarray<int32_t, nb::c_contig, nb::device::cpu>;

const Kernels* kernels_of(const std::string& isa) {
  const Kernels* kernels = find_kernels(isa.c_str());
  if (!kernels) throw nb::value_error(("this machine cannot run " + isa + " kernels").c_str());
  return kernels;
}

std::vector<std::string> isas() {
  std::vector<std::string> found;
  for (const char* isa : {"scalar", "avx2", "avx512"})
    if (find_kernels(isa)) found.push_back(isa);
  return found;
}

nb::ndarray<nb::numpy, uint8_t, nb::ndim<1>> allocate(int64_t bytes) {
  if (bytes < 0) throw nb::value_error("cannot allocate a negative number of bytes");
  struct Block {
    uint8_t* address;
    int64_t bytes;
  };
  auto* block = new Block{nullptr, std::max<int64_t>(bytes, 1)};
  try {
    block->address = map_memory(block->bytes);
  } catch (...) {
    delete block;
    throw;
  }
  nb::capsule owner(block, [](void* p) noexcept {
    auto* b = static_cast<Block*>(p);
    unmap_memory(b->address, b->bytes);
    delete b;
  });
  return nb::ndarray<nb::numpy, uint8_t, nb::ndim<1>>(block->address, {size_t(bytes)}, owner);
}

void check_packed(Format format, int group, int64_t n, int64_t k, const Bytes& data, const Bytes& scales,
                  const Bytes& zeros) {
  if (int64_t(data.size()) < packed_data_bytes(format, group, n, k) ||
      int64_t(scales.size()) < packed_scale_bytes(format, group, n, k) ||
      int64_t(zeros.size()) < packed_zero_bytes(format, group, n, k))
    throw nb::value_error("a packed weight is too small for its shape");
}

bool can_be_sparse(Format format, int group) {
  return group == 0 && (format == Format::int8 || format == Format::bf16);
}

// Packs rows [n0, n1) of a sparse weight; `starts` holds where those before them end.
template <class T, class Pack>
void pack_parts(Pool& pool, Format format, int group, int64_t n, int64_t k, const T* rows, int64_t n0,
                int64_t n1, const Bytes& data, const Bytes& scales, const Bytes& starts, Pack&& pack_part) {
  if (!can_be_sparse(format, group)) throw nb::value_error("only int8 without groups and bf16 can be sparse");
  if (int64_t(starts.size()) < sparse_start_bytes(n) ||
      int64_t(scales.size()) < packed_scale_bytes(format, group, n, k))
    throw nb::value_error("a packed weight is too small for its shape");
  int64_t* const at = reinterpret_cast<int64_t*>(starts.data());
  if (n0 == 0) at[0] = 0;
  if (count_panels(format, k, rows, n0, n1, at) + 64 > int64_t(data.size()))
    throw nb::value_error("a sparse weight has more numbers than were counted");
  nb::gil_scoped_release release;
  const int64_t step = kPanel * 4, tiles = (n1 - n0 + step - 1) / step;
  pool.parallel(tiles, [&](int64_t tile, int) {
    const int64_t a = n0 + tile * step;
    pack_part(a, std::min(n1, a + step), at);
  });
}

void pack(Pool& pool, int format, int group, int64_t n, int64_t k, Floats rows, int64_t n0, Bytes data,
          Bytes scales, Bytes zeros, Bytes starts) {
  const Format f = Format(format);
  if (rows.ndim() != 2 || int64_t(rows.shape(1)) != k) throw nb::value_error("rows must be [rows, k]");
  const int64_t n1 = n0 + int64_t(rows.shape(0));
  if (n0 % kPanel || n1 > n || (n1 % kPanel && n1 != n))
    throw nb::value_error("rows do not cover whole panels");
  const float* from = rows.data();
  if (starts.size()) {
    return pack_parts(pool, f, group, n, k, from, n0, n1, data, scales, starts,
                      [&](int64_t a, int64_t b, const int64_t* at) {
                        pack_sparse(f, k, from + (a - n0) * k, a, b, data.data(),
                                    scales.size() ? scales.data() : nullptr, at);
                      });
  }
  check_packed(f, group, n, k, data, scales, zeros);
  nb::gil_scoped_release release;
  const int64_t step = kPanel * 4, tiles = (n1 - n0 + step - 1) / step;
  pool.parallel(tiles, [&](int64_t tile, int) {
    const int64_t a = n0 + tile * step, b = std::min(n1, a + step);
    pack_rows(f, group, n, k, from + (a - n0) * k, a, b, data.data(), scales.data(), zeros.data());
  });
}

void pack_from_codes(Pool& pool, int format, int group, int64_t n, int64_t k, Codes codes, Floats from_scales,
                     Bytes2 from_zeros, int64_t n0, Bytes data, Bytes scales, Bytes zeros, Bytes starts) {
  const Format f = Format(format);
  if (int64_t(codes.shape(1)) != k) throw nb::value_error("codes must be [rows, k]");
  const int64_t rows = int64_t(codes.shape(0)), n1 = n0 + rows;
  const int64_t groups = group > 0 ? (k + group - 1) / group : 1;
  if (n0 % kPanel || n1 > n || (n1 % kPanel && n1 != n))
    throw nb::value_error("rows do not cover whole panels");
  if (from_scales.ndim() != 2 || int64_t(from_scales.shape(0)) != rows ||
      int64_t(from_scales.shape(1)) != groups)
    throw nb::value_error("scales must be [rows, groups]");
  if (f == Format::uint4 && (int64_t(from_zeros.shape(0)) != rows || int64_t(from_zeros.shape(1)) != groups))
    throw nb::value_error("zeros must be [rows, groups]");
  if (format_bits(f) > 8) throw nb::value_error("floats have no codes");
  if (starts.size()) {
    return pack_parts(pool, f, group, n, k, codes.data(), n0, n1, data, scales, starts,
                      [&](int64_t a, int64_t b, const int64_t* at) {
                        pack_sparse(f, k, codes.data() + (a - n0) * k, from_scales.data() + (a - n0), a, b,
                                    data.data(), scales.data(), at);
                      });
  }
  check_packed(f, group, n, k, data, scales, zeros);
  nb::gil_scoped_release release;
  const int64_t step = kPanel * 4, tiles = (n1 - n0 + step - 1) / step;
  pool.parallel(tiles, [&](int64_t tile, int) {
    const int64_t a = tile * step, b = std::min(rows, a + step);
    pack_codes(f, group, n, k, codes.data() + a * k, from_scales.data() + a * groups,
               from_zeros.size() ? from_zeros.data() + a * groups : nullptr, n0 + a, n0 + b, data.data(),
               scales.data(), zeros.data());
  });
}

int64_t checksum_blocks(int64_t bytes) { return (bytes + kChecksumBlock - 1) / kChecksumBlock; }

void checksums_of(Pool& pool, Bytes data, Bytes sums) {
  if (int64_t(sums.size()) != checksum_blocks(int64_t(data.size())) * 8)
    throw nb::value_error("sums must hold 8 bytes for each MiB of data");
  nb::gil_scoped_release release;
  checksums(pool, data.data(), int64_t(data.size()), reinterpret_cast<uint64_t*>(sums.data()));
}

// A Program with the buffers of its steps.
struct Runner {
  Program program;
  std::shared_ptr<Pool> pool;
  StepBuffers buffers;

  Runner(const std::string& isa, std::shared_ptr<Pool> p) : program(kernels_of(isa), p), pool(p) {}

  int add_packed(int format, int group, float activation_scale, int64_t n, int64_t k, Bytes data,
                 Bytes scales, Bytes zeros, Bytes starts) {
    const Format f = Format(format);
    if (activation_scale != 0.0f && !(activation_scale > 0.0f && f == Format::int8 && group == 0))
      throw nb::value_error("only activations of int8 without groups have a scale of their own");
    if (!starts.size()) check_packed(f, group, n, k, data, scales, zeros);
    const auto or_null = [](const Bytes& bytes) -> const void* {
      return bytes.size() ? bytes.data() : nullptr;
    };
    return program.add_packed({f, group, n, k, padded_k(f, group, k), data.data(), or_null(scales),
                               or_null(zeros), activation_scale,
                               reinterpret_cast<const int64_t*>(or_null(starts))});
  }

  int add_kv(int dtype, int kv_heads, int head_dim, int page_size, Bytes pool_bytes, int group) {
    return program.add_kv(
        {kv_layout(Format(dtype), kv_heads, head_dim, page_size), pool_bytes.data(), group});
  }

  // Operands are (offset, bytes per row or 0).
  using Operands = std::vector<std::pair<int64_t, int64_t>>;
  void emit(int op, int rows, const Operands& in, const Operands& out, const std::vector<int>& weights,
            const std::vector<int64_t>& ints, const std::vector<double>& reals) {
    Instruction instruction{};
    instruction.op = Op(op);
    instruction.rows = Rows(rows);
    if (in.size() > 4 || out.size() > 2 || weights.size() > 8 || ints.size() > 8 || reals.size() > 4)
      throw nb::value_error("too many operands");
    for (size_t i = 0; i < in.size(); i++) std::tie(instruction.in[i], instruction.in_row[i]) = in[i];
    for (size_t i = 0; i < out.size(); i++) std::tie(instruction.out[i], instruction.out_row[i]) = out[i];
    std::fill(std::begin(instruction.weights), std::end(instruction.weights), -1);
    std::copy(weights.begin(), weights.end(), instruction.weights);
    std::copy(ints.begin(), ints.end(), instruction.ints);
    std::copy(reals.begin(), reals.end(), instruction.reals);
    program.emit(instruction);
  }

  void set_memory(Bytes arena, Bytes workspace, Bytes scratch) {
    program.set_arena(arena.data());
    program.set_workspace(workspace.data());
    program.set_scratch(scratch.data(), int64_t(scratch.size()) / pool->size() / 64 * 64);
  }

  void bind_step(Ints ids, Ints positions, Ints rows, Ints spans, Ints parents, Ints tables) {
    buffers.ids = ids.data();
    buffers.positions = positions.data();
    buffers.rows = rows.data();
    buffers.spans = reinterpret_cast<const Span*>(spans.data());
    buffers.parents = parents.data();
    buffers.tables = tables.data();
  }

  void bind_sampling(Bytes rows, Ints history, Ints bias_ids, Floats bias_values, Ints masks, int64_t vocab) {
    SampleArgs& s = buffers.sample;
    s.rows = reinterpret_cast<const SampleRow*>(rows.data());
    s.history = history.data();
    s.bias_ids = bias_ids.data();
    s.bias_values = bias_values.data();
    s.masks = reinterpret_cast<const uint32_t*>(masks.data());
    s.vocab = vocab;
  }

  void bind_sampled(Ints token, nb::ndarray<float, nb::c_contig, nb::device::cpu> logprob, Ints top_ids,
                    nb::ndarray<float, nb::c_contig, nb::device::cpu> top_logprobs, Bytes bad) {
    SampleArgs& s = buffers.sample;
    s.token = token.data();
    s.logprob = logprob.data();
    s.top_ids = top_ids.data();
    s.top_logprobs = top_logprobs.data();
    s.bad = bad.data();
    s.max_logprobs = int32_t(top_ids.shape(1));
  }

  double run(int64_t tokens, int64_t spans, int64_t rows, int64_t table_stride, int64_t logits_offset,
             bool top1) {
    nb::gil_scoped_release release;
    const auto start = std::chrono::steady_clock::now();
    program.run(buffers, {tokens, spans, rows, table_stride}, 0, int64_t(program.segments().size()), top1);
    if (logits_offset >= 0 && !top1) program.sample(buffers, rows, logits_offset);
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  }

  std::vector<std::tuple<int64_t, int64_t, int64_t>> receipt() {
    std::vector<std::tuple<int64_t, int64_t, int64_t>> lines;
    for (const auto& segment : program.segments())
      for (const auto& in : segment.instructions) lines.emplace_back(in.calls, in.nanoseconds, in.rows_done);
    return lines;
  }
};

}  // namespace

NB_MODULE(_native, m) {
  m.doc() = "Gossamer's CPU kernels and the program that runs them.";
  m.def("best_isa", [] { return std::string(best_isa()); });
  m.def("isas", &isas, "Instruction sets whose kernels this machine can run, slowest first.");
  m.def("padded_k", [](int f, int group, int64_t k) { return padded_k(Format(f), group, k); });
  m.def(
      "packed_bytes",
      [](int format, int group, int64_t n, int64_t k, int64_t kept) {
        const Format f = Format(format);
        if (kept >= 0 && !can_be_sparse(f, group))
          throw nb::value_error("only int8 without groups and bf16 can be sparse");
        return std::make_tuple(
            kept < 0 ? packed_data_bytes(f, group, n, k) : sparse_data_bytes(f, n, k, kept),
            packed_scale_bytes(f, group, n, k), packed_zero_bytes(f, group, n, k),
            kept < 0 ? int64_t(0) : sparse_start_bytes(n));
      },
      "format"_a, "group"_a, "n"_a, "k"_a, "kept"_a = -1,
      "Of data, scales, zeros and starts; kept: the numbers "
      "of a sparse weight that are not zero, -1: dense.");
  m.def("activation_bytes", [](int f, int group, int64_t rows, int64_t k) {
    return activation_bytes(Format(f), group, rows, k);
  });
  m.def("kv_page_bytes", [](int dtype, int kv_heads, int head_dim, int page_size) {
    return kv_page_bytes(kv_layout(Format(dtype), kv_heads, head_dim, page_size));
  });
  m.def("allocate", &allocate, "Zeroed bytes on huge pages where there are any.");
  m.attr("sample_row_bytes") = sizeof(SampleRow);

  nb::class_<Pool>(m, "Pool").def(nb::init<int>(), "threads"_a).def_prop_ro("size", &Pool::size);
  m.def("pack_codes", &pack_from_codes, "pool"_a, "format"_a, "group"_a, "n"_a, "k"_a, "codes"_a,
        "from_scales"_a, "from_zeros"_a, "n0"_a, "data"_a, "scales"_a, "zeros"_a, "starts"_a);
  m.def("pack", &pack, "pool"_a, "format"_a, "group"_a, "n"_a, "k"_a, "rows"_a, "n0"_a, "data"_a, "scales"_a,
        "zeros"_a, "starts"_a);
  m.def("checksum_blocks", &checksum_blocks);
  m.def("checksums", &checksums_of, "pool"_a, "data"_a, "sums"_a, "Of every MiB, for data on disk.");
  m.def("probe", [](Pool& pool, const std::string& isa, double seconds, int64_t buffer_bytes) {
    kernels_of(isa);
    Probe p;
    {
      nb::gil_scoped_release release;
      p = probe(pool, isa.c_str(), seconds, buffer_bytes);
    }
    return std::make_tuple(p.read_gb_s, p.int8_gmacs, p.bf16_gmacs, p.fp32_gmacs);
  });

  nb::class_<Runner>(m, "Program")
      .def(nb::init<const std::string&, std::shared_ptr<Pool>>(), "isa"_a, "pool"_a)
      .def("add_packed", &Runner::add_packed)
      .def("add_vector", [](Runner& r, Floats data) { return r.program.add_vector(data.data()); })
      .def("add_kv", &Runner::add_kv)
      .def("emit", &Runner::emit)
      .def("begin_segment", [](Runner& r) { r.program.begin_segment(); })
      .def("begin_unit", [](Runner& r, int64_t rows) { r.program.begin_unit(rows); })
      .def("end_unit", [](Runner& r) { r.program.end_unit(); })
      .def("set_tuning",
           [](Runner& r, int64_t index, int rows, int tiles_per_worker, int block_rows) {
             if (rows < 0 || rows >= kTunings || tiles_per_worker < 1 || block_rows < 1)
               throw nb::value_error("a tuning of no row class, or of no tiles or rows");
             r.program.instruction(index).tunings[rows] = {tiles_per_worker, block_rows};
           })
      .def("time_linear",
           [](Runner& r, int64_t index, int64_t rows, int tiles_per_worker, int block_rows) {
             nb::gil_scoped_release release;
             return r.program.time_linear(index, rows, {tiles_per_worker, block_rows});
           })
      .def("workspace_bytes",
           [](Runner& r, int64_t tokens, int64_t rows) { return r.program.workspace_bytes(tokens, rows); })
      .def("scratch_bytes",
           [](Runner& r, int64_t vocab, int64_t tokens, int64_t rows) {
             return r.program.scratch_bytes(vocab, tokens, rows) * r.pool->size();
           })
      .def("set_memory", &Runner::set_memory)
      .def(
          "copy_tokens",
          [](Runner& r, int group, int source, int source_slot, int target, int target_slot, int64_t tokens) {
            nb::gil_scoped_release release;
            r.program.copy_tokens(group, {source, source_slot, target, target_slot, tokens});
          })
      .def("bind_step", &Runner::bind_step)
      .def("bind_sampling", &Runner::bind_sampling)
      .def("bind_sampled", &Runner::bind_sampled)
      .def("run", &Runner::run)
      .def("receipt", &Runner::receipt);
}

}  // namespace gossamer
