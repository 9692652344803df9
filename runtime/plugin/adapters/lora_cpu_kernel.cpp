// Multi-LoRA on the CPU: y[t] += B_s (A_s x[t]) for every token t, where s is the adapter slot of that token.
//
// One call per linear layer does everything that vLLM's torch path spreads over a dozen small operators: gather the
// rows of each adapter, multiply by A (shrink), multiply by B (expand) and add to the base layer's output. Rows
// without an adapter are not in the plan of the step at all, so they are never touched.
//
// Layouts. A of a slot is packed "lanes last": all slices of a merged layer (q, k, v) side by side, one lane per
// row of A, padded to a multiple of 16. On machines with AVX512-BF16 two neighbouring input features share a 32-bit
// word, as the dot-product instruction wants them. B of a slot is packed per slice in blocks of 32 columns, [rank, 32] each.
// A and B follow one another in one aligned piece of memory that is read once from front to back: at decode this traffic is
// the whole cost. Only the rows an adapter really has are packed: the cost follows its rank, not the slot's.
//
// Sums are kept in fp32 and y is rounded once. A T-REX slot has a gate between shrink and expand: its A carries the rows of
// the router below its own, and the gate maps the lanes of one token to as many lanes as B has columns.

#include <ATen/core/Tensor.h>
#include <omp.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <mutex>
#include <vector>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

constexpr int64_t kLane = 16;     // lanes of one vector register of fp32
constexpr int kTileRows = 8;      // rows of one slot that share the loads of A and B
constexpr int64_t kBlock = 32;    // output columns handled per inner step
constexpr int64_t kAhead = 4096;  // bytes to fetch ahead: the processor's own prefetching stops at every 4 KiB page
constexpr size_t kMaxLayers = size_t{1} << 16;
constexpr size_t kMaxSteps = size_t{1} << 10;
constexpr int64_t kMaxExperts = 512; // vLLM's largest slot rank bounds the rows of a router
constexpr int64_t kSerialBytes = 16 << 10; // below this much weight traffic waking the other threads costs more

typedef float vec __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t vec_u32 __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint16_t vec_u16 __attribute__((vector_size(32), aligned(2), may_alias));

inline vec load(const float* p) { return *reinterpret_cast<const vec*>(p); }
inline void store(float* p, vec v) { *reinterpret_cast<vec*>(p) = v; }

inline vec load(const uint16_t* p) {
  const vec_u32 wide = __builtin_convertvector(*reinterpret_cast<const vec_u16*>(p), vec_u32) << 16;
  return reinterpret_cast<const vec&>(wide);
}

inline void store(uint16_t* p, vec v) {
#ifdef __AVX512BF16__
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh((__m512)v));
#else
  // Round to nearest, ties to even; NaN and infinity keep their upper half.
  vec_u32 bits = reinterpret_cast<const vec_u32&>(v);
  const vec_u32 rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  const auto special = (bits & 0x7f800000u) == 0x7f800000u;
  bits = special ? bits | ((bits & 0xffffu) != 0u ? vec_u32{} + 0x10000u : vec_u32{}) : rounded;
  *reinterpret_cast<vec_u16*>(p) = __builtin_convertvector(bits >> 16, vec_u16);
#endif
}

inline float to_float(float v) { return v; }
inline float to_float(uint16_t v) {
  const uint32_t bits = uint32_t{v} << 16;
  float out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}

// ---- what a step, a slot and a layer are -----------------------------------------------------------------------

struct Tile {
  int32_t slot;
  int32_t first; // position in Step::order
  int32_t rows;
};

// The plan of one engine step, shared by all layers of one engine.
struct Step {
  int64_t tokens = 0;
  std::vector<int32_t> order; // token numbers, grouped by slot, base rows left out
  std::vector<Tile> tiles;
  int64_t intuition_width = 0;        // columns of `intuition`, padded
  std::vector<float> intuition;       // the distinct semantic vectors c of the requests in this step
  std::vector<int32_t> intuition_row; // which of them a token has; negative for none
};

struct Slice {
  int64_t column = 0; // first output column
  int64_t width = 0;
  int64_t lane = 0;   // first lane of A's product
  int64_t rank = 0;   // columns of B; zero when the adapter leaves this slice alone
  int64_t b_at = 0;   // where its B begins, in bytes
  // T-REX: the lanes are [inputs] of A, then [inputs * rank] of the router; zero inputs mean plain LoRA.
  int64_t inputs = 0;
  float token_gain = 0; // of the softmax of the router
  float task_gain = 0;  // of the semantic vector

  int64_t lanes() const { return inputs == 0 ? rank : inputs + inputs * rank; }
};

struct Free {
  void operator()(std::byte* p) const { std::free(p); }
};

// One adapter of one layer. A: [d_in, lanes] of fp32, or [d_in / 2, lanes] of words with two bf16 features each.
// B, per slice: [columns / 32, rank, 32] of the layer's dtype.
struct Slot {
  int64_t lanes = 0; // padded; zero when the adapter leaves this layer alone
  int64_t bytes = 0;
  bool gated = false;
  std::vector<Slice> slices;
  std::unique_ptr<std::byte[], Free> packed;

  template <typename T>
  T* at(int64_t byte) const {
    return reinterpret_cast<T*>(packed.get() + byte);
  }
};

struct Layer {
  Step* step;
  int64_t d_in;
  std::vector<int64_t> widths;
  bool bf16;
  std::vector<Slot> slots;
};

// Fixed tables: an engine that starts in another thread must not move the entries of one that runs.
std::array<std::atomic<Layer*>, kMaxLayers> g_layers{};
std::array<std::atomic<Step*>, kMaxSteps> g_steps{};
std::mutex g_create;

template <typename Table>
int64_t place(Table& table, typename Table::value_type::value_type entry, const char* what) {
  const std::lock_guard<std::mutex> guard(g_create);
  for (size_t i = 0; i < table.size(); ++i) {
    if (table[i].load(std::memory_order_relaxed) == nullptr) {
      table[i].store(entry, std::memory_order_release);
      return static_cast<int64_t>(i);
    }
  }
  TORCH_CHECK(false, "no room for another LoRA ", what, ": ", table.size(), " are open in this process");
}

template <typename Table>
auto& find(Table& table, int64_t id, const char* what) {
  TORCH_CHECK(id >= 0 && id < static_cast<int64_t>(table.size()), "no LoRA ", what, " has the number ", id);
  auto* entry = table[id].load(std::memory_order_acquire);
  TORCH_CHECK(entry != nullptr, "LoRA ", what, " ", id, " is closed");
  return *entry;
}

constexpr int64_t padded(int64_t n, int64_t to = kLane) { return (n + to - 1) / to * to; }

inline void fetch(const void* p) { __builtin_prefetch(p, 0, 3); }

// ---- shrink: lanes = A x ---------------------------------------------------------------------------------------

// Rows x (16 * Blocks) sums over features [from, to). `Unroll` splits the sum into independent chains when there are
// too few rows to hide the latency of the multiply-add.
template <int Rows, int Blocks, int Unroll>
inline void shrink_block(
    const float* const* x, const float* a, int64_t lanes, int64_t from, int64_t to, float* out, int64_t out_stride) {
  vec sum[Unroll][Rows][Blocks] = {};
  int64_t k = from;
  for (; k + Unroll <= to; k += Unroll)
    for (int u = 0; u < Unroll; ++u)
      for (int b = 0; b < Blocks; ++b) {
        fetch(a + (k + u) * lanes + b * kLane + kAhead / 4);
        const vec w = load(a + (k + u) * lanes + b * kLane);
        for (int r = 0; r < Rows; ++r) sum[u][r][b] += w * x[r][k + u];
      }
  for (; k < to; ++k)
    for (int b = 0; b < Blocks; ++b) {
      const vec w = load(a + k * lanes + b * kLane);
      for (int r = 0; r < Rows; ++r) sum[0][r][b] += w * x[r][k];
    }
  for (int r = 0; r < Rows; ++r)
    for (int b = 0; b < Blocks; ++b) {
      for (int u = 1; u < Unroll; ++u) sum[0][r][b] += sum[u][r][b];
      store(out + r * out_stride + b * kLane, sum[0][r][b]);
    }
}

#ifdef __AVX512BF16__
template <int Rows, int Blocks, int Unroll>
inline void shrink_block(
    const uint32_t* const* x, const uint32_t* a, int64_t lanes, int64_t from, int64_t to, float* out, int64_t out_stride) {
  __m512 sum[Unroll][Rows][Blocks];
  for (int u = 0; u < Unroll; ++u)
    for (int r = 0; r < Rows; ++r)
      for (int b = 0; b < Blocks; ++b) sum[u][r][b] = _mm512_setzero_ps();
  int64_t k = from;
  for (; k + Unroll <= to; k += Unroll)
    for (int u = 0; u < Unroll; ++u)
      for (int b = 0; b < Blocks; ++b) {
        fetch(a + (k + u) * lanes + b * kLane + kAhead / 4);
        const __m512bh w = (__m512bh)_mm512_loadu_si512(a + (k + u) * lanes + b * kLane);
        for (int r = 0; r < Rows; ++r)
          sum[u][r][b] = _mm512_dpbf16_ps(sum[u][r][b], w, (__m512bh)_mm512_set1_epi32(static_cast<int>(x[r][k + u])));
      }
  for (; k < to; ++k)
    for (int b = 0; b < Blocks; ++b) {
      const __m512bh w = (__m512bh)_mm512_loadu_si512(a + k * lanes + b * kLane);
      for (int r = 0; r < Rows; ++r)
        sum[0][r][b] = _mm512_dpbf16_ps(sum[0][r][b], w, (__m512bh)_mm512_set1_epi32(static_cast<int>(x[r][k])));
    }
  for (int r = 0; r < Rows; ++r)
    for (int b = 0; b < Blocks; ++b) {
      for (int u = 1; u < Unroll; ++u) sum[0][r][b] = _mm512_add_ps(sum[0][r][b], sum[u][r][b]);
      _mm512_storeu_ps(out + r * out_stride + b * kLane, sum[0][r][b]);
    }
}
#endif

template <int Rows, typename X>
void shrink_rows(const X* const* x, const X* a, int64_t lanes, int64_t from, int64_t to, float* out) {
  constexpr int kUnroll = Rows == 1 ? 4 : (Rows <= 3 ? 2 : 1);
  int64_t lane = 0;
  for (; lane + 2 * kLane <= lanes; lane += 2 * kLane)
    shrink_block<Rows, 2, kUnroll>(x, a + lane, lanes, from, to, out + lane, lanes);
  if (lane < lanes) shrink_block<Rows, 1, 2 * kUnroll>(x, a + lane, lanes, from, to, out + lane, lanes);
}

// ---- gate: lanes = G(x) lanes (T-REX) --------------------------------------------------------------------------

// e^v for v <= 0, to about 1e-7; below -87 it is as good as zero.
inline vec exp_of(vec v) {
  typedef int32_t vec_i32 __attribute__((vector_size(64), aligned(4), may_alias));
  const vec lowest = vec{} - 87.0f;
  v = v < lowest ? lowest : v;
  // Adding 1.5 * 2^23 rounds to an integer and leaves that integer in the lowest bits.
  const vec shifted = v * 1.44269504f + 12582912.0f;
  const vec whole = shifted - 12582912.0f;
  vec f = v - whole * 0.693145752f;
  f -= whole * 1.42860677e-6f;
  vec p = f * 1.98756915e-4f + 1.39819995e-3f;
  p = p * f + 8.33345192e-3f;
  p = p * f + 4.16657959e-2f;
  p = p * f + 1.66666655e-1f;
  p = p * f + 0.5f;
  p = p * f * f + f + 1.0f;
  const vec_i32 power = (reinterpret_cast<const vec_i32&>(shifted) << 23) + reinterpret_cast<const vec_i32&>(p);
  return reinterpret_cast<const vec&>(power);
}

#ifdef __AVX512F__
inline float largest(vec v) { return _mm512_reduce_max_ps((__m512)v); }
inline float sum_of(vec v) { return _mm512_reduce_add_ps((__m512)v); }
#else
inline float largest(vec v) {
  float most = v[0];
  for (int k = 1; k < kLane; ++k) most = std::max(most, v[k]);
  return most;
}
inline float sum_of(vec v) {
  float sum = 0;
  for (int k = 0; k < kLane; ++k) sum += v[k];
  return sum;
}
#endif

// One token of one slice: z_j = sum_i h_i G_ij with G = token_gain * softmax(logits) + task_gain * c and expert
// e = i * rank + j; z takes the place of the first lanes. `c` is padded with zeros to whole vectors.
inline void gate_token(const Slice& slice, float* lanes, const float* c) {
  const int64_t experts = slice.inputs * slice.rank, whole = padded(experts);
  alignas(64) float gate[kMaxExperts + kLane];
  std::copy_n(lanes + slice.inputs, experts, gate);
  std::fill(gate + experts, gate + whole, -std::numeric_limits<float>::infinity());
  vec most = load(gate);
  for (int64_t e = kLane; e < whole; e += kLane) {
    const vec more = load(gate + e);
    most = most < more ? more : most;
  }
  const float top = largest(most);
  vec sums{};
  for (int64_t e = 0; e < whole; e += kLane) {
    const vec power = exp_of(load(gate + e) - top);
    store(gate + e, power);
    sums += power;
  }
  // The padding stands at e^-87 each: nothing beside the largest, which is 1.
  const float gain = slice.token_gain / sum_of(sums);
  for (int64_t e = 0; e < whole; e += kLane) store(gate + e, load(gate + e) * gain + load(c + e) * slice.task_gain);
  store(gate + whole, vec{}); // a block of z may read past the last expert
  alignas(64) float z[kMaxExperts + kLane];
  for (int64_t j = 0; j < slice.rank; j += kLane) {
    vec sum{};
    for (int64_t i = 0; i < slice.inputs; ++i) sum += load(gate + i * slice.rank + j) * lanes[i];
    store(z + j, sum);
  }
  std::copy_n(z, slice.rank, lanes);
}

// Rows of one slot: the lanes of each become those that its B expects.
void gate_tile(const Slot& slot, const Step& step, const int32_t* order, int rows, float* lanes) {
  alignas(64) static constexpr float kNone[kMaxExperts] = {};
  if (!slot.gated) return;
  const auto known = static_cast<int64_t>(step.intuition_row.size());
  for (int r = 0; r < rows; ++r) {
    const int32_t row = order[r] < known ? step.intuition_row[order[r]] : -1;
    for (const Slice& slice : slot.slices) {
      if (slice.inputs == 0) continue;
      const bool fits = row >= 0 && step.intuition_width >= padded(slice.inputs * slice.rank);
      const float* c = fits ? step.intuition.data() + row * step.intuition_width : kNone;
      gate_token(slice, lanes + r * slot.lanes + slice.lane, c);
    }
  }
}

// ---- expand: y += B lanes --------------------------------------------------------------------------------------

// Adds to columns [from, to) of one slice; `from` is a multiple of kBlock. `y` points at the slice's first column of each
// row, `b` at the slice's first block.
template <int Rows, typename Y>
void expand_rows(const float* lanes_of, int64_t lanes, const Y* b, int64_t rank, Y* const* y, int64_t from, int64_t to) {
  b += from * rank;
  for (int64_t c = from; c < to; c += kBlock) {
    const bool whole = c + kBlock <= to;
    Y edge[Rows][kBlock];
    vec sum[Rows][2];
    for (int r = 0; r < Rows; ++r) {
      const Y* row = y[r] + c;
      if (!whole) {
        std::fill_n(edge[r], kBlock, Y{});
        row = std::copy_n(row, to - c, edge[r]) - (to - c);
      }
      sum[r][0] = load(row);
      sum[r][1] = load(row + kLane);
    }
    for (int64_t j = 0; j < rank; ++j, b += kBlock) {
      for (int64_t byte = 0; byte < kBlock * static_cast<int64_t>(sizeof(Y)); byte += 64)
        fetch(reinterpret_cast<const std::byte*>(b) + kAhead + byte);
      const vec w0 = load(b), w1 = load(b + kLane);
      for (int r = 0; r < Rows; ++r) {
        const float v = lanes_of[r * lanes + j];
        sum[r][0] += w0 * v;
        sum[r][1] += w1 * v;
      }
    }
    for (int r = 0; r < Rows; ++r) {
      Y* row = whole ? y[r] + c : edge[r];
      store(row, sum[r][0]);
      store(row + kLane, sum[r][1]);
      if (!whole) std::copy_n(edge[r], to - c, y[r] + c);
    }
  }
}

// ---- one tile: rows of one slot --------------------------------------------------------------------------------

template <typename Y>
struct Rows {
  const Y* x;
  int64_t x_stride;
  Y* y;
  int64_t y_stride;
};

// Calls f with the number of rows as a compile-time constant, so that the sums stay in registers.
template <typename F>
inline void with_rows(int rows, F&& f) {
  switch (rows) {
    case 1: f(std::integral_constant<int, 1>{}); break;
    case 2: f(std::integral_constant<int, 2>{}); break;
    case 3: f(std::integral_constant<int, 3>{}); break;
    case 4: f(std::integral_constant<int, 4>{}); break;
    case 5: f(std::integral_constant<int, 5>{}); break;
    case 6: f(std::integral_constant<int, 6>{}); break;
    case 7: f(std::integral_constant<int, 7>{}); break;
    default: f(std::integral_constant<int, kTileRows>{}); break;
  }
}

void shrink_tile(
    const Layer& layer, const Slot& slot, const int32_t* order, int rows, Rows<float> data, double from, double to, float* out) {
  const float* x[kTileRows];
  for (int r = 0; r < rows; ++r) x[r] = data.x + order[r] * data.x_stride;
  const auto k0 = static_cast<int64_t>(from * layer.d_in), k1 = static_cast<int64_t>(to * layer.d_in);
  with_rows(rows, [&](auto n) { shrink_rows<n()>(x, slot.at<float>(0), slot.lanes, k0, k1, out); });
}

void shrink_tile(
    const Layer& layer, const Slot& slot, const int32_t* order, int rows, Rows<uint16_t> data, double from, double to, float* out) {
#ifdef __AVX512BF16__
  const uint32_t* x[kTileRows];
  for (int r = 0; r < rows; ++r) x[r] = reinterpret_cast<const uint32_t*>(data.x + order[r] * data.x_stride);
  const auto k0 = static_cast<int64_t>(from * (layer.d_in / 2)), k1 = static_cast<int64_t>(to * (layer.d_in / 2));
  with_rows(rows, [&](auto n) { shrink_rows<n()>(x, slot.at<uint32_t>(0), slot.lanes, k0, k1, out); });
#else
  static thread_local std::vector<float> wide;
  wide.resize(static_cast<size_t>(rows * layer.d_in));
  const float* x[kTileRows];
  for (int r = 0; r < rows; ++r) {
    float* row = wide.data() + r * layer.d_in;
    const uint16_t* source = data.x + order[r] * data.x_stride;
    for (int64_t k = 0; k < layer.d_in; ++k) row[k] = to_float(source[k]);
    x[r] = row;
  }
  const auto k0 = static_cast<int64_t>(from * layer.d_in), k1 = static_cast<int64_t>(to * layer.d_in);
  with_rows(rows, [&](auto n) { shrink_rows<n()>(x, slot.at<float>(0), slot.lanes, k0, k1, out); });
#endif
}

// Columns [from, to) of the whole output, as shares of each slice, so that threads get equal work.
template <typename Y>
void expand_tile(const Slot& slot, const int32_t* order, int rows, Rows<Y> data, double from, double to, const float* lanes) {
  for (const Slice& slice : slot.slices) {
    if (slice.rank == 0) continue;
    Y* y[kTileRows];
    for (int r = 0; r < rows; ++r) y[r] = data.y + order[r] * data.y_stride + slice.column;
    const auto edge = [&](double share) {
      const auto column = static_cast<int64_t>(share * slice.width);
      return share >= 1.0 ? slice.width : column / kBlock * kBlock;
    };
    const Y* b = slot.at<const Y>(slice.b_at);
    with_rows(rows, [&](auto n) {
      expand_rows<n()>(lanes + slice.lane, slot.lanes, b, slice.rank, y, edge(from), edge(to));
    });
  }
}

// ---- one layer -------------------------------------------------------------------------------------------------

template <typename Y>
void run(const Layer& layer, Rows<Y> data) {
  const Step& step = *layer.step;
  const int32_t* order = step.order.data();
  int64_t most_lanes = 0, bytes = 0;
  for (const Tile& tile : step.tiles) {
    const Slot& slot = layer.slots[tile.slot];
    most_lanes = std::max(most_lanes, slot.lanes);
    bytes += slot.bytes;
  }
  if (most_lanes == 0) return;
  const auto tiles = static_cast<int64_t>(step.tiles.size());
  const int64_t sums = kTileRows * most_lanes;
  const int threads = omp_in_parallel() || bytes < kSerialBytes ? 1 : omp_get_max_threads();
  static thread_local std::vector<float> scratch;

  if (threads == 1 || tiles >= 4 * threads) {
    // Many tiles: each thread takes whole ones, nobody waits for anybody.
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1)
    for (int64_t t = 0; t < tiles; ++t) {
      const Tile& tile = step.tiles[t];
      const Slot& slot = layer.slots[tile.slot];
      if (slot.lanes == 0) continue;
      if (static_cast<int64_t>(scratch.size()) < sums) scratch.resize(sums);
      shrink_tile(layer, slot, order + tile.first, tile.rows, data, 0.0, 1.0, scratch.data());
      gate_tile(slot, step, order + tile.first, tile.rows, scratch.data());
      expand_tile(slot, order + tile.first, tile.rows, data, 0.0, 1.0, scratch.data());
    }
    return;
  }

  // Few tiles (decode): every thread sums over its share of the input features of each tile, then, when all partial
  // sums are there, adds its share of the output columns.
  if (static_cast<int64_t>(scratch.size()) < threads * tiles * sums) scratch.resize(threads * tiles * sums);
  float* const shared = scratch.data();
#pragma omp parallel num_threads(threads)
  {
    const int me = omp_get_thread_num(), team = omp_get_num_threads();
    const double from = static_cast<double>(me) / team, to = static_cast<double>(me + 1) / team;
    for (int64_t t = 0; t < tiles; ++t) {
      const Tile& tile = step.tiles[t];
      const Slot& slot = layer.slots[tile.slot];
      if (slot.lanes == 0) continue;
      shrink_tile(layer, slot, order + tile.first, tile.rows, data, from, to, shared + (t * team + me) * sums);
    }
#pragma omp barrier
    float lanes[kTileRows * 64];
    std::vector<float> wide_lanes(sums > kTileRows * 64 ? sums : 0);
    float* const total = sums > kTileRows * 64 ? wide_lanes.data() : lanes;
    for (int64_t t = 0; t < tiles; ++t) {
      const Tile& tile = step.tiles[t];
      const Slot& slot = layer.slots[tile.slot];
      if (slot.lanes == 0) continue;
      const int64_t used = tile.rows * slot.lanes;
      const float* part = shared + t * team * sums;
      for (int64_t i = 0; i < used; i += kLane) {
        vec sum = load(part + i);
        for (int other = 1; other < team; ++other) sum += load(part + other * sums + i);
        store(total + i, sum);
      }
      gate_tile(slot, step, order + tile.first, tile.rows, total);
      expand_tile(slot, order + tile.first, tile.rows, data, from, to, total);
    }
  }
}

// ---- operators -------------------------------------------------------------------------------------------------

int64_t lora_step_open() {
  return place(g_steps, new Step(), "step plan");
}

void lora_step_close(int64_t step) {
  const std::lock_guard<std::mutex> guard(g_create);
  TORCH_CHECK(step >= 0 && step < static_cast<int64_t>(kMaxSteps), "no LoRA step plan has the number ", step);
  delete g_steps[step].exchange(nullptr);
}

// `slots`: int64 [tokens], the adapter slot of each token, negative for the base model.
void lora_step_plan(int64_t step_id, const at::Tensor& slots) {
  Step& step = find(g_steps, step_id, "step plan");
  TORCH_CHECK(slots.dim() == 1 && slots.is_contiguous() && slots.scalar_type() == at::kLong, "slots: int64 [tokens]");
  const int64_t* slot_of = slots.const_data_ptr<int64_t>();
  step.tokens = slots.numel();
  step.order.clear();
  step.tiles.clear();
  int64_t most = -1;
  for (int64_t t = 0; t < step.tokens; ++t) most = std::max(most, slot_of[t]);
  for (int64_t slot = 0; slot <= most; ++slot) {
    const auto first = static_cast<int32_t>(step.order.size());
    for (int64_t t = 0; t < step.tokens; ++t)
      if (slot_of[t] == slot) step.order.push_back(static_cast<int32_t>(t));
    const auto end = static_cast<int32_t>(step.order.size());
    for (int32_t at = first; at < end; at += kTileRows)
      step.tiles.push_back({static_cast<int32_t>(slot), at, std::min<int32_t>(kTileRows, end - at)});
  }
}

// `table`: float32 [vectors, width], the semantic vectors c in this step; `rows`: int64 [tokens], which of them each token
// has, negative for none. Stays until it is set again: a step with the same requests need not repeat it.
void lora_step_intuition(int64_t step_id, const at::Tensor& table, const at::Tensor& rows) {
  Step& step = find(g_steps, step_id, "step plan");
  TORCH_CHECK(
      table.dim() == 2 && table.is_contiguous() && table.scalar_type() == at::kFloat && rows.dim() == 1 &&
          rows.is_contiguous() && rows.scalar_type() == at::kLong,
      "table: float32 [vectors, width]; rows: int64 [tokens]");
  const int64_t vectors = table.size(0), width = table.size(1);
  const int64_t* row_of = rows.const_data_ptr<int64_t>();
  for (int64_t t = 0; t < rows.numel(); ++t)
    TORCH_CHECK(row_of[t] < vectors, "token ", t, " names semantic vector ", row_of[t], " of ", vectors);
  step.intuition_width = padded(width);
  step.intuition.assign(vectors * step.intuition_width, 0.0f);
  for (int64_t v = 0; v < vectors; ++v)
    std::copy_n(table.const_data_ptr<float>() + v * width, width, step.intuition.data() + v * step.intuition_width);
  step.intuition_row.assign(row_of, row_of + rows.numel());
}

int64_t lora_layer_open(int64_t step, int64_t d_in, at::IntArrayRef widths, int64_t slots, bool bf16) {
  TORCH_CHECK(d_in > 0 && (!bf16 || d_in % 2 == 0) && slots > 0 && !widths.empty(), "d_in, widths and slots of a LoRA layer");
  auto layer = std::make_unique<Layer>();
  layer->step = &find(g_steps, step, "step plan");
  layer->d_in = d_in;
  layer->widths.assign(widths.begin(), widths.end());
  layer->bf16 = bf16;
  layer->slots.resize(slots);
  const int64_t id = place(g_layers, layer.get(), "layer");
  layer.release();
  return id;
}

void lora_layer_close(int64_t layer) {
  const std::lock_guard<std::mutex> guard(g_create);
  TORCH_CHECK(layer >= 0 && layer < static_cast<int64_t>(kMaxLayers), "no LoRA layer has the number ", layer);
  delete g_layers[layer].exchange(nullptr);
}

// a[i]: [rank_i, d_in], b[i]: [widths[i], rank_i]; rank_i = 0 leaves slice i alone. A T-REX slice has inputs[i] = r1 > 0,
// a[i]: [r1 + r1 * r2, d_in] with the router below A, b[i]: [widths[i], r2], and its gains of token and task.
void lora_layer_set_slot(
    int64_t layer_id, int64_t slot_id, at::TensorList a, at::TensorList b, at::IntArrayRef inputs,
    at::ArrayRef<double> token_gains, at::ArrayRef<double> task_gains) {
  Layer& layer = find(g_layers, layer_id, "layer");
  const size_t slices = layer.widths.size();
  TORCH_CHECK(slot_id >= 0 && slot_id < static_cast<int64_t>(layer.slots.size()), "no slot ", slot_id);
  TORCH_CHECK(a.size() == slices && b.size() == slices, "one A and one B per slice, which are ", slices);
  TORCH_CHECK(
      (inputs.empty() || inputs.size() == slices) && token_gains.size() == inputs.size() && task_gains.size() == inputs.size(),
      "one gate per slice, or none at all");
  const auto dtype = layer.bf16 ? at::kBFloat16 : at::kFloat;
  const int64_t size = layer.bf16 ? 2 : 4;
  Slot slot;
  int64_t lanes = 0, column = 0;
  for (size_t i = 0; i < slices; ++i) {
    TORCH_CHECK(
        a[i].dim() == 2 && b[i].dim() == 2 && a[i].size(1) == layer.d_in && b[i].size(0) == layer.widths[i] &&
            a[i].scalar_type() == dtype && b[i].scalar_type() == dtype && a[i].is_contiguous() && b[i].is_contiguous(),
        "slice ", i, ": A [rank, ", layer.d_in, "] and B [", layer.widths[i], ", rank], contiguous, of the layer's dtype");
    Slice slice{column, layer.widths[i], lanes, b[i].size(1), 0};
    if (!inputs.empty() && inputs[i] > 0 && slice.rank > 0) {
      slice.inputs = inputs[i];
      slice.token_gain = static_cast<float>(token_gains[i]);
      slice.task_gain = static_cast<float>(task_gains[i]);
      slot.gated = true;
    }
    TORCH_CHECK(
        a[i].size(0) == slice.lanes() && slice.inputs * slice.rank <= kMaxExperts,
        "slice ", i, ": A has ", a[i].size(0), " rows, B ", slice.rank, " columns, and the gate ", slice.inputs, " inputs");
    slot.slices.push_back(slice);
    lanes += slice.lanes();
    column += layer.widths[i];
  }
  slot.lanes = padded(lanes);
#ifdef __AVX512BF16__
  const bool pairs = layer.bf16;
#else
  const bool pairs = false;
#endif
  slot.bytes = (pairs ? layer.d_in / 2 : layer.d_in) * slot.lanes * 4;
  for (Slice& slice : slot.slices) {
    slice.b_at = slot.bytes;
    slot.bytes += slice.rank * padded(slice.width, kBlock) * size;
  }
  if (slot.bytes > 0) {
    slot.packed.reset(static_cast<std::byte*>(std::aligned_alloc(64, padded(slot.bytes, 64))));
    TORCH_CHECK(slot.packed, "no memory for ", slot.bytes, " bytes of a packed adapter");
    std::memset(slot.packed.get(), 0, padded(slot.bytes, 64));
  }
  const auto pack = [&](auto zero) {
    using T = decltype(zero);
    for (size_t i = 0; i < slices; ++i) {
      const Slice& slice = slot.slices[i];
      const auto* from_a = static_cast<const T*>(a[i].const_data_ptr());
      const auto* from_b = static_cast<const T*>(b[i].const_data_ptr());
      for (int64_t j = 0; j < slice.lanes(); ++j) {
        const int64_t lane = slice.lane + j;
        for (int64_t k = 0; k < layer.d_in; ++k) {
          const T value = from_a[j * layer.d_in + k];
          if (!pairs) slot.at<float>(0)[k * slot.lanes + lane] = to_float(value);
          else slot.at<uint32_t>(0)[k / 2 * slot.lanes + lane] |= static_cast<uint32_t>(value) << (k % 2 * 16);
        }
      }
      for (int64_t j = 0; j < slice.rank; ++j)
        for (int64_t c = 0; c < slice.width; ++c)
          slot.at<T>(slice.b_at)[(c / kBlock * slice.rank + j) * kBlock + c % kBlock] = from_b[c * slice.rank + j];
    }
  };
  if (layer.bf16) pack(uint16_t{0});
  else pack(float{0});
  layer.slots[slot_id] = std::move(slot);
}

// Operators inside the model take numbers as int64 tensors of one element: a plain integer would be compiled into the graph,
// and a graph that is kept on disk would then name another engine's layers.
int64_t number_in(const at::Tensor& number) {
  TORCH_CHECK(number.numel() == 1 && number.scalar_type() == at::kLong, "a number is one int64");
  return *number.const_data_ptr<int64_t>();
}

// y [tokens, sum(widths)] += LoRA of x [tokens, d_in]; leading dimensions are flattened.
void lora_linear(at::Tensor& y, const at::Tensor& x, const at::Tensor& layer_number) {
  const Layer& layer = find(g_layers, number_in(layer_number), "layer");
  const Step& step = *layer.step;
  if (step.tiles.empty()) return;
  const int64_t d_in = x.size(-1), d_out = y.size(-1);
  const int64_t tokens = x.numel() / d_in;
  TORCH_CHECK(tokens == step.tokens, "the LoRA plan is for ", step.tokens, " tokens, the layer got ", tokens);
  const auto dtype = layer.bf16 ? at::kBFloat16 : at::kFloat;
  TORCH_CHECK(
      d_in == layer.d_in && y.numel() == tokens * d_out && x.scalar_type() == dtype && y.scalar_type() == dtype,
      "the layer got other shapes or another dtype than it was opened with");
  const auto flat = [](const at::Tensor& t) { return t.dim() == 2 ? t.stride(1) == 1 : t.is_contiguous(); };
  TORCH_CHECK(flat(x) && flat(y), "rows of x and y must be contiguous");
  const int64_t x_stride = x.dim() == 2 ? x.stride(0) : d_in, y_stride = y.dim() == 2 ? y.stride(0) : d_out;
  if (layer.bf16) {
    run<uint16_t>(
        layer,
        {static_cast<const uint16_t*>(x.const_data_ptr()), x_stride, static_cast<uint16_t*>(y.mutable_data_ptr()), y_stride});
  } else {
    run<float>(layer, {x.const_data_ptr<float>(), x_stride, y.mutable_data_ptr<float>(), y_stride});
  }
}

// y [tokens, d] += B_s A_s[id] for embeddings: a [slots, vocab, rank], b [slots, 1, d, rank], used [slots] (uint8).
// Adapters of embeddings are rare: the loop is plain, and costs nothing when no slot in use has one.
template <typename T>
void embed(const Step& step, at::Tensor& y, const int64_t* ids, const at::Tensor& a, const at::Tensor& b, const uint8_t* used) {
  const int64_t d = y.size(-1), vocab = a.size(1), rank = a.size(2);
  auto* out = static_cast<T*>(y.mutable_data_ptr());
  for (const Tile& tile : step.tiles) {
    if (!used[tile.slot]) continue;
    const T* a_slot = static_cast<const T*>(a.const_data_ptr()) + tile.slot * vocab * rank;
    const T* b_slot = static_cast<const T*>(b.const_data_ptr()) + tile.slot * d * rank;
    for (int32_t r = 0; r < tile.rows; ++r) {
      const int32_t token = step.order[tile.first + r];
      TORCH_CHECK(ids[token] >= 0 && ids[token] < vocab, "token id ", ids[token], " is outside the vocabulary");
      const T* row = a_slot + ids[token] * rank;
      for (int64_t c = 0; c < d; ++c) {
        float sum = to_float(out[token * d + c]);
        for (int64_t j = 0; j < rank; ++j) sum += to_float(row[j]) * to_float(b_slot[c * rank + j]);
        vec all = vec{} + sum;
        T edge[kLane];
        store(edge, all);
        out[token * d + c] = edge[0];
      }
    }
  }
}

void lora_embedding(
    at::Tensor& y, const at::Tensor& ids, const at::Tensor& a, const at::Tensor& b, const at::Tensor& used,
    const at::Tensor& step_number) {
  const Step& step = find(g_steps, number_in(step_number), "step plan");
  if (step.tiles.empty()) return;
  const auto* flags = used.const_data_ptr<uint8_t>();
  if (std::none_of(step.tiles.begin(), step.tiles.end(), [&](const Tile& tile) { return flags[tile.slot] != 0; })) return;
  TORCH_CHECK(ids.numel() == step.tokens, "the LoRA plan is for ", step.tokens, " tokens, the embedding got ", ids.numel());
  TORCH_CHECK(y.is_contiguous() && a.is_contiguous() && b.is_contiguous() && ids.is_contiguous(), "contiguous tensors");
  TORCH_CHECK(y.scalar_type() == a.scalar_type() && y.scalar_type() == b.scalar_type(), "one dtype");
  std::vector<int64_t> wide;
  const int64_t* id_of;
  if (ids.scalar_type() == at::kInt) {
    wide.assign(ids.const_data_ptr<int32_t>(), ids.const_data_ptr<int32_t>() + ids.numel());
    id_of = wide.data();
  } else {
    id_of = ids.const_data_ptr<int64_t>();
  }
  if (y.scalar_type() == at::kBFloat16) embed<uint16_t>(step, y, id_of, a, b, flags);
  else embed<float>(step, y, id_of, a, b, flags);
}

void lora_linear_meta(at::Tensor&, const at::Tensor&, const at::Tensor&) {}
void lora_embedding_meta(
    at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&) {}

} // namespace

TORCH_LIBRARY(metier, m) {
  m.def("lora_step_open() -> int", lora_step_open);
  m.def("lora_step_close(int step) -> ()", lora_step_close);
  m.def("lora_step_plan(int step, Tensor slots) -> ()");
  m.def("lora_step_intuition(int step, Tensor table, Tensor rows) -> ()");
  m.def("lora_layer_open(int step, int d_in, int[] widths, int slots, bool bf16) -> int", lora_layer_open);
  m.def("lora_layer_close(int layer) -> ()", lora_layer_close);
  m.def(
      "lora_layer_set_slot(int layer, int slot, Tensor[] a, Tensor[] b, int[] inputs=[], float[] token_gains=[], "
      "float[] task_gains=[]) -> ()");
  m.def("lora_linear(Tensor(a!) y, Tensor x, Tensor layer) -> ()");
  m.def("lora_embedding(Tensor(a!) y, Tensor ids, Tensor a, Tensor b, Tensor used, Tensor step) -> ()");
}

TORCH_LIBRARY_IMPL(metier, CPU, m) {
  m.impl("lora_step_plan", lora_step_plan);
  m.impl("lora_step_intuition", lora_step_intuition);
  m.impl("lora_layer_set_slot", lora_layer_set_slot);
  m.impl("lora_linear", lora_linear);
  m.impl("lora_embedding", lora_embedding);
}

TORCH_LIBRARY_IMPL(metier, Meta, m) {
  m.impl("lora_linear", lora_linear_meta);
  m.impl("lora_embedding", lora_embedding_meta);
}
