// The attention of one query: what `attend.py` puts into a compiled step. It reads each key and value
// once, as fast as memory gives them, in whatever format they are kept.
//
// A head's positions are taken in parts, each with a softmax of its own, and the parts are put together
// at the end ("flash-decoding", Dao et al. 2023): threads share them evenly, however few heads there
// are, and what is rounded depends neither on the number of threads nor on the other rows.
//
// Whoever includes this defines THREADS.

#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

namespace {

using Vec = at::vec::Vectorized<float>;
constexpr int64_t LANES = Vec::size();
constexpr int64_t PART = 128;  // positions, a multiple of LANES
constexpr int64_t AHEAD = 32;  // positions that are asked for before they are needed
constexpr int64_t AT_ONCE = 8;  // positions whose numbers are under way together

// A head of one row: shape [positions][width], so many numbers from one position to the next.
template <typename T>
struct Head {
  const T* first;
  int64_t stride;
  const T* at(int64_t position) const { return first + position * stride; }
  Head from(int64_t position) const { return {at(position), stride}; }
};

inline Vec load(const float* from) { return Vec::loadu(from); }

inline Vec load(const c10::BFloat16* from) {
  Vec found;
  at::vec::load_fp32_from_bf16(from, found);
  return found;
}

// Ask for what comes AHEAD; nothing happens where that is beyond the end.
template <int64_t N, typename T>
inline void fetch(Head<T> rows, int64_t width) {
  constexpr int64_t LINE = 64 / sizeof(T);
  for (int64_t n = 0; n < N; n++)
    for (int64_t k = 0; k < width; k += LINE) __builtin_prefetch(rows.at(n + AHEAD) + k);
}

inline float sum(const Vec& x) {
  return at::vec::vec_reduce_all<float>([](Vec& a, Vec& b) { return a + b; }, x);
}

inline float largest(const Vec& x) {
  return at::vec::vec_reduce_all<float>([](Vec& a, Vec& b) { return at::vec::maximum(a, b); }, x);
}

// Lane n is the sum of found[n]: neighbours are added, of two vectors at once.
template <int64_t N>
inline Vec sums(Vec* found) {
  for (int64_t n = 0; n < N / 2; n++) {
    const auto [even, odd] = at::vec::deinterleave2(found[2 * n], found[2 * n + 1]);
    found[n] = even + odd;
  }
  if constexpr (N > 2)
    return sums<N / 2>(found);
  else
    return found[0];
}

// Lane n is the dot product of the query and keys[n], and 0 from N on.
template <int64_t N, typename T>
inline Vec dots(const float* query, Head<T> keys, int64_t width) {
  Vec found[LANES];
  for (int64_t n = 0; n < LANES; n++) found[n] = Vec(0);
  for (int64_t k = 0; k < width; k += LANES) {
    const Vec part = load(query + k);
#pragma GCC unroll 16
    for (int64_t n = 0; n < N; n++)
      found[n] = at::vec::fmadd(part, load(keys.at(n) + k), found[n]);
  }
  return sums<LANES>(found);
}

// mixed += shares[n] * values[n]
template <int64_t N, typename T>
inline void add(float* mixed, const float* shares, Head<T> values, int64_t width) {
  for (int64_t k = 0; k < width; k += LANES) {
    Vec found[2] = {load(mixed + k), Vec(0)};
    for (int64_t n = 0; n < N; n++)
      found[n % 2] = at::vec::fmadd(Vec(shares[n]), load(values.at(n) + k), found[n % 2]);
    (found[0] + found[1]).store(mixed + k);
  }
}

// mixed[width] = sum of exp(score - top) * value, then top, then the sum of exp(score - top).
template <typename T>
void part(float* mixed, const float* query, Head<T> keys, Head<T> values, const bool* mask,
          int64_t positions, int64_t width) {
  const Vec hidden(-std::numeric_limits<float>::infinity()), scale(1 / std::sqrt(float(width)));
  float scores[PART];
  Vec top = hidden;
  const auto keep = [&](int64_t s, const Vec& score, int64_t count) {
    const auto seen = at::vec::VecMask<float, 1>::from(mask + s, count).template cast<float, 1>();
    const Vec shown = Vec::blendv(hidden, score * scale, seen);
    shown.store(scores + s);
    top = at::vec::maximum(top, shown);
  };
  int64_t s = 0;
  for (; s + LANES <= positions; s += LANES) {
    fetch<LANES>(keys.from(s), width);
    keep(s, dots<LANES>(query, keys.from(s), width), LANES);
  }
  if (s < positions) {
    float last[LANES] = {};
    for (int64_t n = s; n < positions; n++) dots<1>(query, keys.from(n), width).store(last + n - s, 1);
    keep(s, load(last), positions - s);  // beyond the last position, nothing is seen
  }
  mixed[width] = largest(top);
  const Vec offset(std::max(mixed[width], std::numeric_limits<float>::lowest()));
  Vec total(0);
  for (s = 0; s < positions; s += LANES) {
    const Vec share = (Vec::loadu(scores + s) - offset).exp();
    share.store(scores + s);
    total = total + share;
  }
  mixed[width + 1] = sum(total);

  std::fill(mixed, mixed + width, 0.0f);
  for (s = 0; s + AT_ONCE <= positions; s += AT_ONCE) {
    fetch<AT_ONCE>(values.from(s), width);
    add<AT_ONCE>(mixed, scores + s, values.from(s), width);
  }
  for (; s < positions; s++) add<1>(mixed, scores + s, values.from(s), width);
}

// mixed[width] = the average of what the parts found, each by its share of the whole.
inline void together(float* mixed, const float* found, int64_t parts, int64_t width) {
  float top = -std::numeric_limits<float>::infinity(), total = 0;
  for (int64_t p = 0; p < parts; p++) top = std::max(top, found[p * (width + 2) + width]);
  std::fill(mixed, mixed + width, 0.0f);
  for (int64_t p = 0; p < parts; p++, found += width + 2) {
    const float share = std::exp(found[width] - top);
    total += share * found[width + 1];
    add<1>(mixed, &share, Head<float>{found, 0}, width);
  }
  for (int64_t k = 0; k < width; k++) mixed[k] /= total;
}

// A tensor's address and strides, as the C interface of torch tells them.
template <typename T>
struct Given {
  T* first = nullptr;
  int64_t *sizes = nullptr, *strides = nullptr;
  explicit Given(AtenTensorHandle tensor) {
    void* address = nullptr;
    aoti_torch_get_data_ptr(tensor, &address);
    aoti_torch_get_sizes(tensor, &sizes);
    aoti_torch_get_strides(tensor, &strides);
    first = static_cast<T*>(address);
  }
  T* at(int64_t row, int64_t head) const { return first + row * strides[0] + head * strides[1]; }
};

template <typename T>
void whole(AtenTensorHandle mixed_BH1K, AtenTensorHandle queries_BH1K, AtenTensorHandle keys_BHSK,
           AtenTensorHandle values_BHSK, AtenTensorHandle mask_B11S) {
  const Given<float> mixed(mixed_BH1K), queries(queries_BH1K);
  const Given<T> keys(keys_BHSK), values(values_BHSK);
  const Given<bool> mask(mask_B11S);
  const int64_t rows = keys.sizes[0], heads = keys.sizes[1], positions = keys.sizes[2];
  const int64_t width = keys.sizes[3], parts = (positions + PART - 1) / PART;
  std::vector<float> found(rows * heads * parts * (width + 2));

#pragma omp parallel for num_threads(THREADS) if (THREADS > 1)
  for (int64_t n = 0; n < rows * heads * parts; n++) {
    const int64_t row = n / parts / heads, head = n / parts % heads, begin = n % parts * PART;
    const Head<T> its_keys{keys.at(row, head), keys.strides[2]};
    const Head<T> its_values{values.at(row, head), values.strides[2]};
    part(found.data() + n * (width + 2), queries.at(row, head), its_keys.from(begin),
         its_values.from(begin), mask.at(row, 0) + begin, std::min(PART, positions - begin), width);
  }
  for (int64_t n = 0; n < rows * heads; n++)
    together(mixed.at(n / heads, n % heads), found.data() + n * parts * (width + 2), parts, width);
}

}  // namespace

// The operator, as a compiled graph calls it: queries_BH1K, keys_BHSK and mask_B11S to mixed_BH1K.
extern "C" {
static AOTITorchError aoti_torch_cpu_attend(AtenTensorHandle queries, AtenTensorHandle keys,
                                            AtenTensorHandle values, AtenTensorHandle mask,
                                            AtenTensorHandle* mixed) {
  int64_t* sizes = nullptr;
  int32_t format = 0;
  aoti_torch_get_sizes(queries, &sizes);
  aoti_torch_get_dtype(keys, &format);
  const int64_t strides[] = {sizes[1] * sizes[3], sizes[3], sizes[3], 1};
  const AOTITorchError failed =
      aoti_torch_empty_strided(4, sizes, strides, aoti_torch_dtype_float32(), aoti_torch_device_type_cpu(),
                               0, mixed);
  if (failed) return failed;
  if (format == aoti_torch_dtype_bfloat16())
    whole<c10::BFloat16>(*mixed, queries, keys, values, mask);
  else
    whole<float>(*mixed, queries, keys, values, mask);
  return AOTI_TORCH_SUCCESS;
}
}
