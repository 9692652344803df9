// FIER on the CPU: one decode step of attention that reads 1-bit keys of every token and exact keys of the best.
//
// Beside vLLM's paged cache, in which keys are stored transposed, stand a row of every key ([slots, h, d], so that one
// token's key is one piece of memory) and a page of codes for each group of g slots and each key-value head:
// for each 32 channels the bits of the g tokens, one word a token, then the least and the greatest key of each channel, in
// the keys' type.
// Both are found by the physical slot: shared prefixes and blocks in their second use need no bookkeeping, because a
// group's page is written when its last slot is. A page is read only for groups that are whole.
//
// A step takes, for each sequence and key-value head: scores (one pass over the codes with the sum of the queries that
// share the head), the `budget` best by a histogram of the scores and a selection within the bin of the last of them
// (of equal scores the earlier token, as in key_retrieval.top_tokens), then softmax and values of those and of the tail.

#include <ATen/core/Tensor.h>
#include <omp.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

using bf16 = uint16_t;
typedef float vec __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t vec_i __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t vec_u32 __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint16_t vec_u16 __attribute__((vector_size(32), aligned(2), may_alias));

constexpr int kLane = 16;
constexpr int kWord = 32;      // channels of one word of bits
constexpr int kGroupUnit = 32; // what groups are multiples of
constexpr int kMaxShared = 16; // query heads that share one key-value head
constexpr int kBins = 512;
constexpr int kAhead = 16;    // tokens fetched ahead of their use: single rows escape the processor's own prefetching

inline vec load(const float* p) { return *reinterpret_cast<const vec*>(p); }
inline vec load(const bf16* p) {
  const vec_u32 wide = __builtin_convertvector(*reinterpret_cast<const vec_u16*>(p), vec_u32) << 16;
  return reinterpret_cast<const vec&>(wide);
}
inline void store(float* p, vec v) { *reinterpret_cast<vec*>(p) = v; }
inline void store(bf16* p, vec v) {
  vec_u32 bits = reinterpret_cast<const vec_u32&>(v);
  bits = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  *reinterpret_cast<vec_u16*>(p) = __builtin_convertvector(bits, vec_u16);
}
inline float widen(float x) { return x; }
inline float widen(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
inline float sum(vec v) {
#ifdef __AVX512F__
  return _mm512_reduce_add_ps(reinterpret_cast<const __m512&>(v));
#else
  float s = 0;
  for (int i = 0; i < kLane; i++) s += v[i];
  return s;
#endif
}
inline vec least(vec a, vec b) { return a < b ? a : b; }
inline vec greatest(vec a, vec b) { return a > b ? a : b; }

template <typename T, int D>
constexpr int64_t page_bytes(int group) { return int64_t{group} * (D / kWord) * 4 + 2 * D * int64_t{sizeof(T)}; }

// ---- codes ------------------------------------------------------------------------------------------------------

// One bit per lane: whether a is greater than b there.
inline uint32_t greater_bits(vec a, vec b) {
#ifdef __AVX512F__
  return _mm512_cmp_ps_mask(reinterpret_cast<const __m512&>(a), reinterpret_cast<const __m512&>(b), _CMP_GT_OQ);
#else
  const vec_i above = a > b;
  uint32_t bits = 0;
  for (int i = 0; i < kLane; i++) bits |= static_cast<uint32_t>(above[i] & 1) << i;
  return bits;
#endif
}

template <typename T, int D>
void encode_group(const T* rows, int64_t row_stride, int group, uint8_t* page) {
  uint32_t* words = reinterpret_cast<uint32_t*>(page);
  T* low = reinterpret_cast<T*>(words + D / kWord * group);
  T* high = low + D;
  for (int c = 0; c < D; c += kWord) {
    vec lo[2] = {load(rows + c), load(rows + c + kLane)}, hi[2] = {lo[0], lo[1]}, middle[2];
    for (int t = 1; t < group; t++)
      for (int i = 0; i < 2; i++) {
        const vec key = load(rows + t * row_stride + c + i * kLane);
        lo[i] = least(key, lo[i]);
        hi[i] = greatest(key, hi[i]);
      }
    for (int i = 0; i < 2; i++) {
      middle[i] = (lo[i] + hi[i]) * 0.5f;
      store(low + c + i * kLane, lo[i]);
      store(high + c + i * kLane, hi[i]);
    }
    for (int t = 0; t < group; t++) {
      const T* row = rows + t * row_stride + c;
      words[c / kWord * group + t] = greater_bits(load(row), middle[0]) | greater_bits(load(row + kLane), middle[1]) << kLane;
    }
  }
}

template <typename T, int D>
void store_keys(const T* key, int64_t token_stride, int64_t tokens, const int64_t* slots, int64_t heads, T* rows,
                uint8_t* pages, int group) {
  const int64_t bytes = page_bytes<T, D>(group);
  for (int64_t t = 0; t < tokens; t++)
    if (slots[t] >= 0) std::memcpy(rows + slots[t] * heads * D, key + t * token_stride, heads * D * sizeof(T));
#pragma omp parallel for schedule(static) if (tokens >= 4 * group)
  for (int64_t t = 0; t < tokens; t++) {
    if (slots[t] < 0 || slots[t] % group != group - 1) continue;
    const int64_t number = slots[t] / group;
    for (int64_t h = 0; h < heads; h++)
      encode_group<T, D>(rows + (number * group * heads + h) * D, heads * D, group, pages + (number * heads + h) * bytes);
  }
}

// ---- scores -----------------------------------------------------------------------------------------------------

// Scores of 16 tokens: out[i] = base + sum over channels of step[c] where bit c % 32 of words[c / 32 * group + i] is set.
template <int D>
inline void score_words_portable(const uint32_t* words, int group, const float* step, float base, float* out) {
  vec even = vec{} + base, odd = {};
  for (int w = 0; w < D / kWord; w++) {
    const vec_i tokens = *reinterpret_cast<const vec_i*>(words + w * group);
    for (int c = 0; c < kWord; c += 2) {
      int32_t a, b;
      std::memcpy(&a, step + w * kWord + c, 4);
      std::memcpy(&b, step + w * kWord + c + 1, 4);
      const vec_i x = ((tokens & static_cast<int32_t>(1u << c)) != 0) & a;
      const vec_i y = ((tokens & static_cast<int32_t>(2u << c)) != 0) & b;
      even += reinterpret_cast<const vec&>(x);
      odd += reinterpret_cast<const vec&>(y);
    }
  }
  store(out, even + odd);
}

#ifdef __AVX512F__
// The same for a whole group. The 16 sums that four channels' steps can give are a table in one register, and the four
// bits of a token look up theirs: three operations where adding each channel under a mask takes eight.
template <int D>
inline void score_words_wide(const uint32_t* words, int group, const float* step, float base, float* out) {
  __m512 table[D / 4];
  for (int n = 0; n < D / 4; n++) {
    __m512 t = _mm512_maskz_mov_ps(0xaaaa, _mm512_set1_ps(step[4 * n]));
    t = _mm512_mask_add_ps(t, 0xcccc, t, _mm512_set1_ps(step[4 * n + 1]));
    t = _mm512_mask_add_ps(t, 0xf0f0, t, _mm512_set1_ps(step[4 * n + 2]));
    table[n] = _mm512_mask_add_ps(t, 0xff00, t, _mm512_set1_ps(step[4 * n + 3]));
  }
  for (int i = 0; i < group; i += kLane) {
    __m512 even = _mm512_set1_ps(base), odd = _mm512_setzero_ps();
    for (int w = 0; w < D / kWord; w++) {
      const __m512i tokens = _mm512_loadu_si512(words + w * group + i);
      const __m512* at = table + w * 8; // vpermps reads the lowest four bits of a lane only
      even = _mm512_add_ps(even, _mm512_permutexvar_ps(tokens, at[0]));
      odd = _mm512_add_ps(odd, _mm512_permutexvar_ps(_mm512_srli_epi32(tokens, 4), at[1]));
      even = _mm512_add_ps(even, _mm512_permutexvar_ps(_mm512_srli_epi32(tokens, 8), at[2]));
      odd = _mm512_add_ps(odd, _mm512_permutexvar_ps(_mm512_srli_epi32(tokens, 12), at[3]));
      even = _mm512_add_ps(even, _mm512_permutexvar_ps(_mm512_srli_epi32(tokens, 16), at[4]));
      odd = _mm512_add_ps(odd, _mm512_permutexvar_ps(_mm512_srli_epi32(tokens, 20), at[5]));
      even = _mm512_add_ps(even, _mm512_permutexvar_ps(_mm512_srli_epi32(tokens, 24), at[6]));
      odd = _mm512_add_ps(odd, _mm512_permutexvar_ps(_mm512_srli_epi32(tokens, 28), at[7]));
    }
    _mm512_storeu_ps(out + i, _mm512_add_ps(even, odd));
  }
}
#endif

template <typename T, int D>
inline void score_group(const uint8_t* page, const float* query, int group, bool wide, float* out) {
  const uint32_t* words = reinterpret_cast<const uint32_t*>(page);
  const T* low = reinterpret_cast<const T*>(words + D / kWord * group);
  alignas(64) float step[D];
  vec base = {};
  for (int c = 0; c < D; c += kLane) {
    const vec q = load(query + c), lo = load(low + c);
    base += q * lo;
    store(step + c, q * (load(low + D + c) - lo));
  }
  const float offset = sum(base);
#ifdef __AVX512F__
  if (wide) {
    score_words_wide<D>(words, group, step, offset, out);
    return;
  }
#endif
  for (int i = 0; i < group; i += kLane) score_words_portable<D>(words + i, group, step, offset, out + i);
}

// ---- the choice -------------------------------------------------------------------------------------------------

struct Scratch {
  std::vector<float> scores, logits;
  std::vector<int32_t> chosen, edge, bins;
};

// The `budget` best of `closed` scores (a multiple of 16), ascending, to `chosen`. Scores that are no numbers come last.
void choose(Scratch& at, int closed, int budget, int sinks) {
  float* scores = at.scores.data();
  vec top = load(scores), bottom = top;
  for (int t = kLane; t < closed; t += kLane) {
    top = greatest(load(scores + t), top);
    bottom = least(load(scores + t), bottom);
  }
  float most = top[0], fewest = bottom[0];
  for (int i = 1; i < kLane; i++) most = std::max(most, top[i]), fewest = std::min(fewest, bottom[i]);
  const float span = most - fewest;
  const float inverse = span > 0 && std::isfinite(span) ? (kBins - 1) / span : 0.f;
  int32_t* bins = at.bins.data();
  int32_t counts[2][kBins] = {};
  for (int t = 0; t < closed; t += kLane) {
    vec score = load(scores + t);
    score = score == score ? score : vec{} - std::numeric_limits<float>::max(); // an order needs numbers
    store(scores + t, score);
    vec x = (score - fewest) * inverse;
    x = x >= 0.f ? x : vec{};
    x = x <= float(kBins - 1) ? x : vec{} + float(kBins - 1);
    *reinterpret_cast<vec_i*>(bins + t) = __builtin_convertvector(x, vec_i);
  }
  for (int t = 0; t < sinks; t++) scores[t] = std::numeric_limits<float>::infinity(), bins[t] = kBins - 1;
  for (int t = 0; t < closed; t += 2) counts[0][bins[t]]++, counts[1][bins[t + 1]]++;
  int above = 0, bin = kBins - 1;
  for (; bin > 0 && above + counts[0][bin] + counts[1][bin] < budget; bin--) above += counts[0][bin] + counts[1][bin];
  // Within the bin of the last one: the best that there is still room for.
  at.edge.clear();
  int32_t* chosen = at.chosen.data();
  int found = 0;
  for (int t = 0; t < closed; t += kLane) {
    const vec_i b = *reinterpret_cast<const vec_i*>(bins + t);
#ifdef __AVX512F__
    const __m512i lanes = reinterpret_cast<const __m512i&>(b), limit = _mm512_set1_epi32(bin);
    uint32_t hits = _mm512_cmpge_epi32_mask(lanes, limit);
#else
    uint32_t hits = 0;
    for (int i = 0; i < kLane; i++) hits |= uint32_t(b[i] >= bin) << i;
#endif
    for (; hits; hits &= hits - 1) {
      const int i = t + __builtin_ctz(hits);
      if (bins[i] > bin) chosen[found++] = i;
      else at.edge.push_back(i);
    }
  }
  const size_t room = std::min<size_t>(static_cast<size_t>(budget - found), at.edge.size());
  if (room < at.edge.size()) {
    const auto before = [scores](int32_t a, int32_t b) { return scores[a] != scores[b] ? scores[a] > scores[b] : a < b; };
    std::nth_element(at.edge.begin(), at.edge.begin() + room, at.edge.end(), before);
    at.edge.resize(room);
    std::sort(at.edge.begin(), at.edge.end());
  }
  at.bins.assign(chosen, chosen + found);
  std::merge(at.bins.begin(), at.bins.end(), at.edge.begin(), at.edge.end(), chosen);
}

// ---- attention on the chosen ------------------------------------------------------------------------------------

struct Step {
  int64_t heads, kv_heads, block, value_block_stride, value_head_stride;
  float scale;
  int budget, group, min_context, sinks;
  bool wide;
};

template <typename T, int D, int S>
void attend(const Step& s, const T* query, const T* rows, const T* values, const int32_t* blocks, int64_t head,
            const Scratch& at, int count, float* logits, T* out) {
  const int32_t* chosen = at.chosen.data();
  const auto slot = [&](int t) { return int64_t{blocks[t / s.block]} * s.block + t % s.block; };
  const auto value = [&](int t) {
    return values + int64_t{blocks[t / s.block]} * s.value_block_stride + head * s.value_head_stride + t % s.block * int64_t{D};
  };
  float most[S], total[S];
  for (int g = 0; g < S; g++) most[g] = -std::numeric_limits<float>::infinity(), total[g] = 0;
#ifdef __AVX512BF16__
  constexpr bool dots = std::is_same_v<T, bf16>;
#else
  constexpr bool dots = false;
#endif
  for (int j = 0; j < count; j++) {
    if (j + kAhead < count) {
      const T* next = rows + (slot(chosen[j + kAhead]) * s.kv_heads + head) * D;
      const T* with = value(chosen[j + kAhead]); // in the second pass it is near by then
      for (size_t byte = 0; byte < D * sizeof(T); byte += 64) {
        __builtin_prefetch(reinterpret_cast<const char*>(next) + byte);
        __builtin_prefetch(reinterpret_cast<const char*>(with) + byte, 0, 2);
      }
    }
    const T* key = rows + (slot(chosen[j]) * s.kv_heads + head) * D;
    for (int g = 0; g < S; g++) {
      vec dot = {};
      if constexpr (dots) {
#ifdef __AVX512BF16__
        __m512 acc = _mm512_setzero_ps();
        for (int c = 0; c < D; c += 32)
          acc = _mm512_dpbf16_ps(acc, (__m512bh)_mm512_loadu_si512(query + g * D + c), (__m512bh)_mm512_loadu_si512(key + c));
        dot = reinterpret_cast<const vec&>(acc);
#endif
      } else {
        for (int c = 0; c < D; c += kLane) dot += load(query + g * D + c) * load(key + c);
      }
      const float x = sum(dot) * s.scale;
      logits[g * count + j] = x;
      most[g] = std::max(most[g], x);
    }
  }
  for (int g = 0; g < S; g++)
    for (int j = 0; j < count; j++) total[g] += logits[g * count + j] = std::exp(logits[g * count + j] - most[g]);
  vec acc[S][D / kLane] = {};
  for (int j = 0; j < count; j++) {
    if (j + kAhead < count) {
      const char* next = reinterpret_cast<const char*>(value(chosen[j + kAhead]));
      for (size_t byte = 0; byte < D * sizeof(T); byte += 64) __builtin_prefetch(next + byte);
    }
    const T* v = value(chosen[j]);
    for (int c = 0; c < D / kLane; c++) {
      const vec x = load(v + c * kLane);
      for (int g = 0; g < S; g++) acc[g][c] += x * logits[g * count + j];
    }
  }
  for (int g = 0; g < S; g++)
    for (int c = 0; c < D / kLane; c++) store(out + g * D + c * kLane, acc[g][c] / total[g]);
}

template <typename T, int D>
void attend_any(int shared, const Step& s, const T* query, const T* rows, const T* values, const int32_t* blocks,
                int64_t head, const Scratch& at, int count, float* logits, T* out) {
  // At most four heads at a time: what stays in registers.
  for (int g = 0; g < shared;) {
    const int left = shared - g;
    const T* q = query + g * D;
    if (left >= 4) attend<T, D, 4>(s, q, rows, values, blocks, head, at, count, logits, out + g * D), g += 4;
    else if (left == 3) attend<T, D, 3>(s, q, rows, values, blocks, head, at, count, logits, out + g * D), g += 3;
    else if (left == 2) attend<T, D, 2>(s, q, rows, values, blocks, head, at, count, logits, out + g * D), g += 2;
    else attend<T, D, 1>(s, q, rows, values, blocks, head, at, count, logits, out + g * D), g += 1;
  }
}

template <typename T, int D>
void decode(const Step& s, int64_t sequences, const T* query, int64_t query_stride, const T* rows, const uint8_t* pages,
            const T* values, const int32_t* table, int64_t table_stride, const int32_t* lengths, T* out, int64_t out_stride) {
  const int shared = static_cast<int>(s.heads / s.kv_heads);
  const int64_t bytes = page_bytes<T, D>(s.group);
  const int64_t groups_per_block = s.block / s.group;
#pragma omp parallel for collapse(2) schedule(dynamic, 1)
  for (int64_t r = 0; r < sequences; r++)
    for (int64_t h = 0; h < s.kv_heads; h++) {
      static thread_local Scratch at;
      const int length = lengths[r], groups = length / s.group, closed = groups * s.group;
      const int32_t* blocks = table + r * table_stride;
      const T* q = query + r * query_stride + h * shared * D;
      at.scores.resize(closed + kWord);
      at.chosen.resize(length + kWord);
      int count = 0;
      if (length < s.min_context || closed <= s.budget) {
        for (; count < length; count++) at.chosen[count] = count;
      } else {
        alignas(64) float joint[D] = {};
        for (int g = 0; g < shared; g++)
          for (int c = 0; c < D; c++) joint[c] += widen(q[g * D + c]);
        for (int p = 0; p < groups; p++) {
          const auto page_of = [&](int64_t n) {
            return pages + ((int64_t{blocks[n / groups_per_block]} * groups_per_block + n % groups_per_block) * s.kv_heads + h) * bytes;
          };
          if (p + 4 < groups) {
            const uint8_t* next = page_of(p + 4);
            for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(next + byte);
          }
          score_group<T, D>(page_of(p), joint, s.group, s.wide, &at.scores[p * s.group]);
        }
        at.bins.resize(closed + kWord);
        choose(at, closed, s.budget, s.sinks);
        count = s.budget;
        for (int t = closed; t < length; t++) at.chosen[count++] = t;
      }
      at.logits.resize(static_cast<size_t>(std::min(shared, 4)) * count);
      attend_any<T, D>(shared, s, q, rows, values, blocks, h, at, count, at.logits.data(), out + r * out_stride + h * shared * D);
    }
}

// ---- operators --------------------------------------------------------------------------------------------------

// Widths of heads, all of whole words of codes; HEAD_DIMS in fier_settings.py is the same list.
using Widths = std::integer_sequence<int, 32, 64, 96, 128, 256>;

template <typename T, typename Call, int... D>
bool by_width(int64_t width, Call&& call, std::integer_sequence<int, D...>) {
  return ((width == D && (call(T{}, std::integral_constant<int, D>{}), true)) || ...);
}

template <typename Call>
void by_type_and_width(const at::Tensor& like, Call&& call) {
  const auto width = like.size(-1);
  const bool half = like.scalar_type() == at::kBFloat16;
  TORCH_CHECK(half || like.scalar_type() == at::kFloat, "fier: bfloat16 or float32 is needed, not ", like.scalar_type());
  const bool known = half ? by_width<bf16>(width, call, Widths{}) : by_width<float>(width, call, Widths{});
  TORCH_CHECK(known, "fier: no kernel for heads of ", width, " channels");
}

void fier_store(const at::Tensor& given, const at::Tensor& slots, const at::Tensor& rows, const at::Tensor& pages, int64_t group) {
  const int64_t tokens = std::min(given.size(0), slots.size(0));
  TORCH_CHECK(given.dim() == 3, "fier: keys are [tokens, heads, channels]");
  const bool together = given.stride(2) == 1 && given.stride(1) == given.size(2);
  const at::Tensor key = together ? given : given.contiguous();
  TORCH_CHECK(slots.scalar_type() == at::kLong && slots.is_contiguous() && rows.is_contiguous() && pages.is_contiguous());
  TORCH_CHECK(rows.scalar_type() == key.scalar_type() && rows.size(1) == key.size(1) && rows.size(2) == key.size(2));
  TORCH_CHECK(group > 0 && group % kGroupUnit == 0, "fier: a group is a multiple of 32 tokens");
  by_type_and_width(key, [&](auto type, auto width) {
    using T = decltype(type);
    constexpr int D = decltype(width)::value;
    TORCH_CHECK((pages.size(2) == page_bytes<T, D>(static_cast<int>(group))), "fier: pages of another size");
    store_keys<T, D>(static_cast<const T*>(key.const_data_ptr()), key.stride(0), tokens, slots.const_data_ptr<int64_t>(), key.size(1),
                     static_cast<T*>(rows.data_ptr()), pages.data_ptr<uint8_t>(), static_cast<int>(group));
  });
}

void fier_decode(const at::Tensor& out, const at::Tensor& query, const at::Tensor& rows, const at::Tensor& pages,
                 const at::Tensor& values, const at::Tensor& table, const at::Tensor& lengths, double scale, int64_t budget,
                 int64_t group, int64_t min_context, int64_t sinks, bool wide) {
  TORCH_CHECK(query.dim() == 3 && query.stride(2) == 1 && query.stride(1) == query.size(2), "fier: queries of a token must lie together");
  TORCH_CHECK(out.dim() == 3 && out.stride(2) == 1 && out.stride(1) == out.size(2) && out.scalar_type() == query.scalar_type());
  TORCH_CHECK(values.dim() == 4 && values.stride(3) == 1 && values.stride(2) == values.size(3) && values.size(2) % group == 0);
  TORCH_CHECK(table.scalar_type() == at::kInt && table.stride(1) == 1 && lengths.scalar_type() == at::kInt && lengths.is_contiguous());
  TORCH_CHECK(budget > 0 && sinks <= budget && query.size(1) / rows.size(1) <= kMaxShared);
  TORCH_CHECK(values.scalar_type() == query.scalar_type() && rows.scalar_type() == query.scalar_type());
  TORCH_CHECK(lengths.size(0) >= query.size(0) && table.size(0) >= query.size(0));
  const Step s{query.size(1), rows.size(1), values.size(2), values.stride(0), values.stride(1), static_cast<float>(scale),
               static_cast<int>(budget), static_cast<int>(group), static_cast<int>(min_context), static_cast<int>(sinks), wide};
  by_type_and_width(query, [&](auto type, auto width) {
    using T = decltype(type);
    decode<T, decltype(width)::value>(s, query.size(0), static_cast<const T*>(query.const_data_ptr()), query.stride(0),
                                      static_cast<const T*>(rows.const_data_ptr()), pages.const_data_ptr<uint8_t>(),
                                      static_cast<const T*>(values.const_data_ptr()), table.const_data_ptr<int32_t>(), table.stride(0),
                                      lengths.const_data_ptr<int32_t>(), static_cast<T*>(out.data_ptr()), out.stride(0));
  });
}

} // namespace

TORCH_LIBRARY_FRAGMENT(metier, m) {
  m.def("fier_store(Tensor key, Tensor slots, Tensor(a!) rows, Tensor(b!) pages, int group) -> ()");
  m.def(
      "fier_decode(Tensor(a!) out, Tensor query, Tensor rows, Tensor pages, Tensor values, Tensor table, Tensor lengths, "
      "float scale, int budget, int group, int min_context, int sinks, bool wide) -> ()");
}

TORCH_LIBRARY_IMPL(metier, CPU, m) {
  m.impl("fier_store", fier_store);
  m.impl("fier_decode", fier_decode);
}
