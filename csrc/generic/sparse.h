// Weights that are stored without their zeros (api.h: PackedWeight). Blocks of inputs are expanded to the
// dense layout, which then goes through the tiles of the dense format: the same numbers in the same order,
// hence the same bits.
//
// An ISA gives expand_block<bytes>(from, to), which expands one block to kSparseBlock inputs x 16 outputs of
// `bytes` each; it returns where the next block begins.
#pragma once
#include "generic/blocks.h"
#include "generic/numbers.h"

namespace gossamer {
namespace GOSSAMER_ISA {
namespace {

constexpr int64_t kBlockNumbers = kSparseBlock * kPanel;
constexpr int64_t kBitsBytes = kBlockNumbers / 8;

template <int64_t kBytes>
const uint8_t* expand_block(const uint8_t* from, uint8_t* to);

inline uint64_t load_bits(const uint8_t* p) {
  uint64_t bits;
  std::memcpy(&bits, p, sizeof bits);
  return bits;
}

inline const uint8_t* sparse_panel(const PackedWeight& w, int64_t panel) {
  return static_cast<const uint8_t*>(w.data) + w.starts[panel];
}

// F: the dense format whose tiles read weights as they are packed (kUnpackedBytes is not looked at).
template <class F, int64_t kBytes>
void linear_sparse(const PackedWeight& w, const Activations& act, const float* bias, float* out, int64_t ldo,
                   int64_t p0, int64_t p1, void* scratch) {
  static_assert(F::kBlock % kSparseBlock == 0, "blocks of both kinds end together");
  static_assert(kMostBlocks * F::kPanels * F::kBlock * kPanel * kBytes <= kUnpackBytes, "a block fits");
  if (act.m <= 0) return;
  Tile t{};
  t.w = &w;
  t.act = &act;
  t.bias = bias;
  t.out = out;
  t.ldo = ldo;
  uint8_t* const acc = static_cast<uint8_t*>(scratch);
  uint8_t* const expanded = acc + kAccBytes;
  const int64_t m = act.m, block = F::kBlock * blocks_in_l1();
  const int64_t fit = kActivationBytes / larger(1, act.row_stride_bytes);
  const int64_t sweeps = ceil_div(m, smaller(kMaxBlockRows, larger(64, fit)));
  t.b = expanded;
  t.b_panel = block * kPanel * kBytes;
  for (int64_t s = 0; s < sweeps; s++) {
    const int64_t m0 = m * s / sweeps, rows = m * (s + 1) / sweeps - m0;
    const int64_t blocks = ceil_div(rows, F::kRows);
    for (int64_t p = p0; p < p1; p += F::kPanels) {
      const int64_t panels = smaller(F::kPanels, p1 - p);
      const uint8_t* from[F::kPanels];
      for (int64_t i = 0; i < panels; i++) from[i] = sparse_panel(w, p + i);
      t.panel = p;
      for (int64_t k = 0; k < w.k_pad; k = t.k1) {
        t.k0 = k;
        t.k1 = smaller(k + block, w.k_pad);
        const uint8_t* const began = from[0];
        for (int64_t i = 0; i < panels; i++) {
          uint8_t* to = expanded + i * t.b_panel;
          for (int64_t at = k; at < t.k1; at += kSparseBlock, to += kBlockNumbers * kBytes) {
            from[i] = expand_block<kBytes>(from[i], to);
          }
        }
        // The next block takes about what this one took, which the row blocks share the asking for.
        t.ahead_step = (from[0] - began) / larger(1, (t.k1 - k) / F::kUnit * blocks);
        t.ahead_panel = panels > 1 ? from[panels - 1] - from[0] : 0;
        for (int64_t i = 0; i < blocks; i++) {
          const int64_t r0 = rows * i / blocks, r1 = rows * (i + 1) / blocks;
          t.row = m0 + r0;
          t.acc = acc + r0 * 2 * kPanel * 4;
          t.ahead = from[0] + i * ((t.k1 - k) / F::kUnit) * t.ahead_step;
          run_tile<F>(r1 - r0, panels, t);
        }
      }
    }
  }
}

// The stored number of every input of one output, in ascending order: take(k, pointer to it, null where it is
// 0). Each vector of the dense layout holds `unit` inputs of 16 outputs; those before a lane's say where its
// own lie.
template <int64_t kBytes, class F>
inline void over_sparse_row(const PackedWeight& w, int64_t id, F&& take) {
  constexpr int64_t unit = 4 / kBytes, vectors = kSparseBlock / unit;
  const int64_t lane = id % kPanel * unit;
  const uint8_t* block = sparse_panel(w, id / kPanel);
  for (int64_t k0 = 0; k0 < w.k_pad; k0 += kSparseBlock) {
    const uint8_t* values = block + kBitsBytes;
    for (int64_t v = 0; v < vectors; v++) {
      uint64_t bits = 0;
      std::memcpy(&bits, block + v * unit * 2, size_t(unit * 2));
      const uint8_t* own = values + kBytes * __builtin_popcountll(bits & ((uint64_t(1) << lane) - 1));
      for (int64_t i = 0; i < unit; i++) {
        const int64_t k = k0 + v * unit + i;
        const bool there = bits >> (lane + i) & 1;
        if (k < w.k) take(k, there ? own : nullptr);
        own += there ? kBytes : 0;
      }
      values += kBytes * __builtin_popcountll(bits);
    }
    block = values;
  }
}

inline void embed_sparse_row(const PackedWeight& w, int64_t id, float scale, float* out) {
  if (w.format == Format::bf16) {
    over_sparse_row<2>(w, id, [&](int64_t k, const uint8_t* value) {
      uint16_t half = 0;
      if (value) std::memcpy(&half, value, sizeof half);
      out[k] = bf16_to_float(half) * scale;
    });
  } else {
    const float own = static_cast<const float*>(w.scales)[id];
    over_sparse_row<1>(w, id, [&](int64_t k, const uint8_t* value) {
      out[k] = (float(value ? *value - 128 : 0) * own) * scale;
    });
  }
}

}  // namespace
}  // namespace GOSSAMER_ISA
}  // namespace gossamer
