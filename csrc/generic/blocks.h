// How a linear layer is cut: rows into blocks whose activations stay in L2, outputs into one or two panels,
// inputs into blocks whose weights stay in L1, and these into register tiles. Shared by every ISA.
//
// An ISA gives one struct F per format:
//   kRows, kPanels   the largest register tile
//   kUnit            inputs that one step of the tile takes
//   kBlock           inputs per L1 block of a 32 KiB cache (a multiple of every group)
//   kNarrowRows      up to here weights are read as they are packed, which costs less than unpacking them
//   tile<MR, P>(t)   adds inputs [t.k0, t.k1) to MR rows x P panels; partial sums travel through t.acc
//   Narrow           the variant that reads packed panels once, for few rows (F where nothing is unpacked)
//   kStreamRows      up to so many rows Narrow takes one panel at a time, beyond (up to kRows) two while the
//                    next two come: either way one stream from memory per thread, which goes faster than two
//   kUnpackedBytes   0, or bytes per input and panel that unpack(w, panel, k0, k1, to) writes
// A value depends on the order of the inputs alone, which is the same in all of these.
#pragma once
#include <unistd.h>

#include "api.h"

namespace gossamer {
namespace GOSSAMER_ISA {
namespace {

constexpr int64_t kMaxBlockRows = 256;         // rows that share one sweep over the panels
constexpr int64_t kActivationBytes = 1 << 19;  // of those rows, to stay in L2 beside the weights
constexpr int64_t kPrefetchBytes = 4096;       // how far ahead the narrow path asks for weights
constexpr int64_t kAccBytes = kMaxBlockRows * 2 * kPanel * 4;
constexpr int64_t kMostBlocks = 2;
constexpr int64_t kUnpackBytes = kMostBlocks * 16384;  // both panels of an L1 block

struct Tile {
  const PackedWeight* w;
  const Activations* act;
  const float* bias;
  float* out;
  int64_t ldo;
  int64_t panel;         // first of the P panels
  int64_t row;           // first of the MR rows
  int64_t k0, k1;        // inputs
  const uint8_t* b;      // weights of input k0 of the first panel, as the tile reads them
  int64_t b_panel;       // bytes from there to the next panel
  uint8_t* acc;          // partial sums, 2 * kPanel words a row
  const uint8_t* ahead;  // weights wanted next, asked for along the way: `ahead_step` bytes per step,
  int64_t ahead_step, ahead_panel;  // in each panel

  bool first() const { return k0 == 0; }
  bool last() const { return k1 == w->k_pad; }
};

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Packed bytes of one input in a panel.
inline int64_t input_bytes(Format format) {
  switch (format) {
    case Format::f32:
      return kPanel * 4;
    case Format::f16:
    case Format::bf16:
      return kPanel * 2;
    case Format::int8:
      return kPanel;
    case Format::int4:
    case Format::uint4:
    case Format::nf4:
      return kPanel / 2;
  }
  return 0;
}

inline const uint8_t* panel_data(const PackedWeight& w, int64_t panel) {
  return static_cast<const uint8_t*>(w.data) + panel * w.k_pad * input_bytes(w.format);
}

// Scales and zero points of the 16 outputs of a panel in group g.
inline const uint16_t* group_scales(const PackedWeight& w, int64_t panel, int64_t g) {
  return static_cast<const uint16_t*>(w.scales) + (panel * (w.k_pad / w.group) + g) * kPanel;
}
inline const uint8_t* group_zeros(const PackedWeight& w, int64_t panel, int64_t g) {
  return static_cast<const uint8_t*>(w.zeros) + (panel * (w.k_pad / w.group) + g) * kPanel;
}

// What a tile reads beside weights and activations, group by group. Copied from the tile, whose members the
// compiler would load again after every store.
struct GroupScales {
  const uint16_t* weights;  // of the first panel; `panel` from there to the next, and so zeros
  const uint8_t* zeros;
  const float* activations;  // of the first row, the next beside it; and so sums
  const int32_t* sums;
  int64_t panel, stride;

  explicit GroupScales(const Tile& t) {
    const int64_t g = t.k0 / t.w->group;
    panel = t.w->k_pad / t.w->group * kPanel;
    stride = t.act->scale_stride;
    weights = group_scales(*t.w, t.panel, g);
    zeros = group_zeros(*t.w, t.panel, g);
    activations = t.act->scales + g * stride + t.row;
    sums = t.act->sums + g * stride + t.row;
  }
  void next() {
    weights += kPanel;
    zeros += kPanel;
    activations += stride;
    sums += stride;
  }
};

inline const uint8_t* activation_row(const Activations& act, int64_t row) {
  return static_cast<const uint8_t*>(act.data) + row * act.row_stride_bytes;
}

template <class F, int P, int MR = F::kRows>
inline void run_rows(int64_t rows, const Tile& t) {
  if constexpr (MR == 1) {
    F::template tile<1, P>(t);
  } else if (rows == MR) {
    F::template tile<MR, P>(t);
  } else {
    run_rows<F, P, MR - 1>(rows, t);
  }
}

template <class F>
inline void run_tile(int64_t rows, int64_t panels, const Tile& t) {
  if constexpr (F::kPanels == 2) {
    if (panels == 2) return run_rows<F, 2>(rows, t);
  }
  run_rows<F, 1>(rows, t);
}

template <class F>
void linear_narrow(Tile t, int64_t p0, int64_t p1) {
  const PackedWeight& w = *t.w;
  const int64_t bytes = input_bytes(w.format), panel_bytes = w.k_pad * bytes;
  const int64_t blocks = ceil_div(t.act->m, F::kRows);
  const int64_t side_by_side = t.act->m <= F::kStreamRows ? 1 : F::kPanels;
  t.b_panel = t.ahead_panel = panel_bytes;
  t.ahead_step = F::kUnit * bytes;
  for (int64_t p = p0; p < p1; p += side_by_side) {
    const int64_t panels = smaller(side_by_side, p1 - p);
    t.panel = p;
    for (int64_t i = 0; i < blocks; i++) {
      t.row = t.act->m * i / blocks;
      const int64_t rows = t.act->m * (i + 1) / blocks - t.row;
      if (F::kStreamRows > 0 && panels == 2 && blocks == 1) {
        // Two panels share each activation, and memory still goes by as one stream: that of the next two.
        t.k0 = 0, t.k1 = w.k_pad;
        t.b = panel_data(w, p);
        t.ahead = panel_data(w, p + 2);
        t.ahead_step = 2 * F::kUnit * bytes;
        t.ahead_panel = F::kUnit * bytes;
        run_tile<F>(rows, panels, t);
        continue;
      }
      // The last stretch of a panel asks for the start of the panel after the ones being read.
      const int64_t turn = panels == 1 ? w.k_pad : larger(0, w.k_pad - kPrefetchBytes / bytes);
      for (int64_t k = 0; k < w.k_pad; k = t.k1) {
        t.k0 = k;
        t.k1 = k < turn ? turn : w.k_pad;
        t.b = panel_data(w, p) + k * bytes;
        t.ahead = t.b + kPrefetchBytes + (k < turn ? 0 : (panels - 1) * panel_bytes);
        run_tile<F>(rows, panels, t);
      }
    }
  }
}

// How many times kBlock fits: a cache of 48 KiB has room for weights of twice as many inputs, which halves
// the traffic of partial sums.
inline int64_t blocks_in_l1() {
#ifdef _SC_LEVEL1_DCACHE_SIZE
  static const int64_t found = sysconf(_SC_LEVEL1_DCACHE_SIZE) >= (48 << 10) ? kMostBlocks : 1;
  return found;
#else
  return 1;
#endif
}

template <class F>
void linear_wide(Tile t, int64_t p0, int64_t p1, uint8_t* unpacked) {
  const PackedWeight& w = *t.w;
  const int64_t bytes = input_bytes(w.format), m = t.act->m, block = F::kBlock * blocks_in_l1();
  uint8_t* const acc = t.acc;
  const int64_t fit = kActivationBytes / larger(1, smaller(t.act->row_stride_bytes, w.k_pad * 4));
  const int64_t sweeps = ceil_div(m, smaller(kMaxBlockRows, larger(64, fit)));
  t.ahead_panel = w.k_pad * bytes;
  for (int64_t s = 0; s < sweeps; s++) {
    const int64_t m0 = m * s / sweeps, rows = m * (s + 1) / sweeps - m0;
    const int64_t blocks = ceil_div(rows, F::kRows);
    t.ahead_step = larger(1, F::kUnit * bytes / blocks);
    for (int64_t p = p0; p < p1; p += F::kPanels) {
      const int64_t panels = smaller(F::kPanels, p1 - p);
      t.panel = p;
      for (int64_t k = 0; k < w.k_pad; k = t.k1) {
        t.k0 = k;
        t.k1 = smaller(k + block, w.k_pad);
        t.b = panel_data(w, p) + k * bytes;
        t.b_panel = w.k_pad * bytes;
        const uint8_t* next = t.last() ? panel_data(w, p + panels) : panel_data(w, p) + t.k1 * bytes;
        if constexpr (F::kUnpackedBytes > 0) {
          t.b = unpacked;
          t.b_panel = block * F::kUnpackedBytes;
          for (int64_t i = 0; i < panels; i++) F::unpack(w, p + i, k, t.k1, unpacked + i * t.b_panel);
        }
        for (int64_t i = 0; i < blocks; i++) {
          const int64_t r0 = rows * i / blocks, r1 = rows * (i + 1) / blocks;
          t.row = m0 + r0;
          t.acc = acc + r0 * 2 * kPanel * 4;
          t.ahead = next + i * ((t.k1 - t.k0) / F::kUnit) * t.ahead_step;
          run_tile<F>(r1 - r0, panels, t);
        }
      }
    }
  }
}

constexpr int64_t kLinearScratch = kAccBytes + kUnpackBytes;

template <class F>
void linear_blocked(const PackedWeight& w, const Activations& act, const float* bias, float* out, int64_t ldo,
                    int64_t p0, int64_t p1, void* scratch) {
  static_assert(kMostBlocks * F::kPanels * F::kBlock * F::kUnpackedBytes <= kUnpackBytes,
                "an L1 block fits its buffer");
  if (act.m <= 0) return;
  Tile t{};
  t.w = &w;
  t.act = &act;
  t.bias = bias;
  t.out = out;
  t.ldo = ldo;
  t.acc = static_cast<uint8_t*>(scratch);
  if (act.m <= F::kNarrowRows) {
    linear_narrow<typename F::Narrow>(t, p0, p1);
  } else {
    linear_wide<F>(t, p0, p1, t.acc + kAccBytes);
  }
}

}  // namespace
}  // namespace GOSSAMER_ISA
}  // namespace gossamer
