// Attention of a single query over a KV cache, which `cpu_kernels.py` puts into compiled decode
// steps. It reads each key and value once, at the speed of memory, in the dtype of the cache.
//
// The positions of a head are split into chunks, each with a softmax of its own, which are combined at
// the end ("flash-decoding", Dao et al. 2023): threads share the chunks evenly, however few heads there
// are, and rounding depends neither on the number of threads nor on the other rows.
//
// The including file defines THREADS.

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
constexpr int64_t CHUNK = 128;  // positions, a multiple of LANES
constexpr int64_t PREFETCH_DISTANCE = 32;  // positions
constexpr int64_t UNROLL = 8;  // positions of values that are added in one pass over the output

// The keys or values of one head of one row: [positions][width], `stride` elements between positions.
template <typename T>
struct Head {
  const T* data;
  int64_t stride;
  const T* at(int64_t position) const { return data + position * stride; }
  Head from(int64_t position) const { return {at(position), stride}; }
};

inline Vec load(const float* data) { return Vec::loadu(data); }

inline Vec load(const c10::BFloat16* data) {
  Vec x;
  at::vec::load_fp32_from_bf16(data, x);
  return x;
}

// Prefetch N positions from PREFETCH_DISTANCE on; beyond the end this has no effect.
template <int64_t N, typename T>
inline void prefetch(Head<T> head, int64_t width) {
  constexpr int64_t LINE = 64 / sizeof(T);  // elements of a cache line
  for (int64_t n = 0; n < N; n++)
    for (int64_t k = 0; k < width; k += LINE) __builtin_prefetch(head.at(n + PREFETCH_DISTANCE) + k);
}

inline float sum_lanes(const Vec& x) {
  return at::vec::vec_reduce_all<float>([](Vec& a, Vec& b) { return a + b; }, x);
}

inline float max_lane(const Vec& x) {
  return at::vec::vec_reduce_all<float>([](Vec& a, Vec& b) { return at::vec::maximum(a, b); }, x);
}

// Lane n is the sum of x[n], by adding neighboring lanes of two vectors at a time.
template <int64_t N>
inline Vec sum_each(Vec* x) {
  for (int64_t n = 0; n < N / 2; n++) {
    const auto [even, odd] = at::vec::deinterleave2(x[2 * n], x[2 * n + 1]);
    x[n] = even + odd;
  }
  if constexpr (N > 2)
    return sum_each<N / 2>(x);
  else
    return x[0];
}

// Lane n is the dot product of the query and keys[n], and 0 from N on.
template <int64_t N, typename T>
inline Vec dot_products(const float* query, Head<T> keys, int64_t width) {
  Vec products[LANES];
  for (int64_t n = 0; n < LANES; n++) products[n] = Vec(0);
  for (int64_t k = 0; k < width; k += LANES) {
    const Vec q = load(query + k);
#pragma GCC unroll 16
    for (int64_t n = 0; n < N; n++)
      products[n] = at::vec::fmadd(q, load(keys.at(n) + k), products[n]);
  }
  return sum_each<LANES>(products);
}

// out[width] += sum of weights[n] * values[n]
template <int64_t N, typename T>
inline void add_weighted(float* out, const float* weights, Head<T> values, int64_t width) {
  for (int64_t k = 0; k < width; k += LANES) {
    Vec sums[2] = {load(out + k), Vec(0)};
    for (int64_t n = 0; n < N; n++)
      sums[n % 2] = at::vec::fmadd(Vec(weights[n]), load(values.at(n) + k), sums[n % 2]);
    (sums[0] + sums[1]).store(out + k);
  }
}

// out[width + 2] = sum of exp(score - max score) * value, then max score, then sum of exp(score - max score).
template <typename T>
void attend_chunk(float* out, const float* query, Head<T> keys, Head<T> values, const bool* mask,
                  int64_t positions, int64_t width) {
  const Vec masked(-std::numeric_limits<float>::infinity()), scale(1 / std::sqrt(float(width)));
  float scores[CHUNK];
  Vec max_score = masked;
  const auto store_scores = [&](int64_t s, const Vec& products, int64_t count) {
    const auto keep = at::vec::VecMask<float, 1>::from(mask + s, count).template cast<float, 1>();
    const Vec score = Vec::blendv(masked, products * scale, keep);
    score.store(scores + s);
    max_score = at::vec::maximum(max_score, score);
  };
  int64_t s = 0;
  for (; s + LANES <= positions; s += LANES) {
    prefetch<LANES>(keys.from(s), width);
    store_scores(s, dot_products<LANES>(query, keys.from(s), width), LANES);
  }
  if (s < positions) {
    float rest[LANES] = {};
    for (int64_t n = s; n < positions; n++)
      dot_products<1>(query, keys.from(n), width).store(rest + n - s, 1);
    store_scores(s, load(rest), positions - s);  // lanes beyond the last position are masked
  }
  out[width] = max_lane(max_score);
  const Vec offset(std::max(out[width], std::numeric_limits<float>::lowest()));
  Vec total(0);
  for (s = 0; s < positions; s += LANES) {
    const Vec weight = (Vec::loadu(scores + s) - offset).exp();
    weight.store(scores + s);
    total = total + weight;
  }
  out[width + 1] = sum_lanes(total);

  std::fill(out, out + width, 0.0f);
  for (s = 0; s + UNROLL <= positions; s += UNROLL) {
    prefetch<UNROLL>(values.from(s), width);
    add_weighted<UNROLL>(out, scores + s, values.from(s), width);
  }
  for (; s < positions; s++) add_weighted<1>(out, scores + s, values.from(s), width);
}

// out[width] = the outputs of `attend_chunk`, each weighted by its share of the softmax.
inline void combine_chunks(float* out, const float* chunk, int64_t chunks, int64_t width) {
  float max_score = -std::numeric_limits<float>::infinity(), total = 0;
  for (int64_t c = 0; c < chunks; c++) max_score = std::max(max_score, chunk[c * (width + 2) + width]);
  std::fill(out, out + width, 0.0f);
  for (int64_t c = 0; c < chunks; c++, chunk += width + 2) {
    const float weight = std::exp(chunk[width] - max_score);
    total += weight * chunk[width + 1];
    add_weighted<1>(out, &weight, Head<float>{chunk, 0}, width);
  }
  for (int64_t k = 0; k < width; k++) out[k] /= total;
}

// A view of a tensor, by torch's C interface.
template <typename T>
struct TensorView {
  T* data = nullptr;
  int64_t *sizes = nullptr, *strides = nullptr;
  explicit TensorView(AtenTensorHandle tensor) {
    void* address = nullptr;
    aoti_torch_get_data_ptr(tensor, &address);
    aoti_torch_get_sizes(tensor, &sizes);
    aoti_torch_get_strides(tensor, &strides);
    data = static_cast<T*>(address);
  }
  T* at(int64_t row, int64_t head) const { return data + row * strides[0] + head * strides[1]; }
};

template <typename T>
void attend(AtenTensorHandle out_BH1K, AtenTensorHandle queries_BH1K, AtenTensorHandle keys_BHSK,
            AtenTensorHandle values_BHSK, AtenTensorHandle mask_B11S) {
  const TensorView<float> out(out_BH1K), queries(queries_BH1K);
  const TensorView<T> keys(keys_BHSK), values(values_BHSK);
  const TensorView<bool> mask(mask_B11S);
  const int64_t rows = keys.sizes[0], heads = queries.sizes[1], positions = keys.sizes[2];
  const int64_t group = heads / keys.sizes[1];  // query heads that share a head of keys and values
  const int64_t width = keys.sizes[3], chunks = (positions + CHUNK - 1) / CHUNK;
  std::vector<float> partial(rows * heads * chunks * (width + 2));

#pragma omp parallel for num_threads(THREADS) if (THREADS > 1)
  for (int64_t n = 0; n < rows * heads * chunks; n++) {
    const int64_t row = n / chunks / heads, head = n / chunks % heads, start = n % chunks * CHUNK;
    const Head<T> head_keys{keys.at(row, head / group), keys.strides[2]};
    const Head<T> head_values{values.at(row, head / group), values.strides[2]};
    attend_chunk(partial.data() + n * (width + 2), queries.at(row, head), head_keys.from(start),
                 head_values.from(start), mask.at(row, 0) + start, std::min(CHUNK, positions - start),
                 width);
  }
  for (int64_t n = 0; n < rows * heads; n++)
    combine_chunks(out.at(n / heads, n % heads), partial.data() + n * chunks * (width + 2), chunks,
                   width);
}

}  // namespace

// The operator tinygpt::attend as compiled graphs call it: writes a new tensor out_BH1K, in float32.
extern "C" {
static AOTITorchError aoti_torch_cpu_attend(AtenTensorHandle queries, AtenTensorHandle keys,
                                            AtenTensorHandle values, AtenTensorHandle mask,
                                            AtenTensorHandle* out) {
  int64_t* sizes = nullptr;
  int32_t dtype = 0;
  aoti_torch_get_sizes(queries, &sizes);
  aoti_torch_get_dtype(keys, &dtype);
  const int64_t strides[] = {sizes[1] * sizes[3], sizes[3], sizes[3], 1};
  const AOTITorchError error =
      aoti_torch_empty_strided(4, sizes, strides, aoti_torch_dtype_float32(), aoti_torch_device_type_cpu(),
                               0, out);
  if (error) return error;
  if (dtype == aoti_torch_dtype_bfloat16())
    attend<c10::BFloat16>(*out, queries, keys, values, mask);
  else
    attend<float>(*out, queries, keys, values, mask);
  return AOTI_TORCH_SUCCESS;
}
}
