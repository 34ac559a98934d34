// The product of few rows of 8-bit integers and a matrix, which `cpu_kernels.py` puts into compiled
// steps. It reads the matrix once, as it is stored, and its sums are exact on every processor.
//
// The including file defines THREADS, MAX_INT8_ROWS and MIN_INT8_WEIGHTS: more rows, and smaller matrices,
// go to `torch._int_mm`.

#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <cstdint>
#include <vector>

namespace int8_kernel {

// Types for which compilers generate the dot product instructions of the processor: VNNI's vpdpbusd
// multiplies unsigned by signed bytes, the older vpmaddwd 16-bit integers.
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
using Input = int8_t;
using Weight = uint8_t;
constexpr int32_t OFFSET = 128;  // added to weights
#else
using Input = int16_t;
using Weight = int16_t;
constexpr int32_t OFFSET = 0;
#endif

// TorchInductor compiles with -fno-tree-loop-vectorize.
#pragma GCC push_options
#pragma GCC optimize("tree-loop-vectorize")

// out[r][n] = dot product of x[r] and weight[n], for ROWS x OUTPUTS of them.
template <int ROWS, int OUTPUTS>
inline void multiply_block(int32_t* out, const Input* x, const int32_t* excess, const int8_t* weight,
                           int64_t out_features, int64_t in_features) {
  int32_t sums[ROWS][OUTPUTS] = {};
  for (int64_t k = 0; k < in_features; k++) {
#pragma GCC unroll 4
    for (int n = 0; n < OUTPUTS; n++) {
      const Weight w = Weight(weight[n * in_features + k] + OFFSET);
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; r++) sums[r][n] += w * x[r * in_features + k];
    }
  }
  for (int r = 0; r < ROWS; r++)
    for (int n = 0; n < OUTPUTS; n++) out[r * out_features + n] = sums[r][n] - excess[r];
}

template <int OUTPUTS>
inline void multiply_rows(int32_t* out, const Input* x, const int32_t* excess, const int8_t* weight,
                          int64_t rows, int64_t out_features, int64_t in_features) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4)
    multiply_block<4, OUTPUTS>(out + r * out_features, x + r * in_features, excess + r, weight,
                               out_features, in_features);
  for (; r < rows; r++)
    multiply_block<1, OUTPUTS>(out + r * out_features, x + r * in_features, excess + r, weight,
                               out_features, in_features);
}

inline void multiply(int32_t* out, const int8_t* x, const int8_t* weight, int64_t rows,
                     int64_t out_features, int64_t in_features) {
  const std::vector<Input> input(x, x + rows * in_features);
  std::vector<int32_t> excess(rows);
  for (int64_t r = 0; r < rows; r++) {
    int32_t sum = 0;
    for (int64_t k = 0; k < in_features; k++) sum += OFFSET * input[r * in_features + k];
    excess[r] = sum;
  }
  const int64_t blocks = out_features / 4;
#pragma omp parallel for num_threads(THREADS) if (THREADS > 1)
  for (int64_t n = 0; n < blocks; n++)
    multiply_rows<4>(out + 4 * n, input.data(), excess.data(), weight + 4 * n * in_features, rows,
                     out_features, in_features);
  for (int64_t n = 4 * blocks; n < out_features; n++)
    multiply_rows<1>(out + n, input.data(), excess.data(), weight + n * in_features, rows, out_features,
                     in_features);
}

#pragma GCC pop_options

}  // namespace int8_kernel

// The operator tinygpt::int8_mm as compiled graphs call it: writes a new tensor out_BN of 32-bit integers.
extern "C" {
static AOTITorchError aoti_torch_cpu_int8_mm(AtenTensorHandle x_BK, AtenTensorHandle weight_NK,
                                             AtenTensorHandle* out_BN) {
  int64_t *x_sizes = nullptr, *weight_sizes = nullptr;
  aoti_torch_get_sizes(x_BK, &x_sizes);
  aoti_torch_get_sizes(weight_NK, &weight_sizes);
  const int64_t rows = x_sizes[0], in_features = x_sizes[1], out_features = weight_sizes[0];
  const int64_t sizes[] = {rows, out_features}, strides[] = {out_features, 1};
  AOTITorchError error =
      aoti_torch_empty_strided(2, sizes, strides, aoti_torch_dtype_int32(), aoti_torch_device_type_cpu(),
                               0, out_BN);
  if (error) return error;
  if (rows > MAX_INT8_ROWS || out_features * in_features < MIN_INT8_WEIGHTS) {
    const int64_t sizes_KN[] = {in_features, out_features}, strides_KN[] = {1, in_features};
    AtenTensorHandle weight_KN = nullptr;
    error = aoti_torch__reinterpret_tensor(weight_NK, 2, sizes_KN, strides_KN, 0, &weight_KN);
    if (error) return error;
    error = aoti_torch_cpu__int_mm_out(*out_BN, x_BK, weight_KN);
    aoti_torch_delete_tensor_object(weight_KN);
    return error;
  }
  void *out = nullptr, *x = nullptr, *weight = nullptr;
  aoti_torch_get_data_ptr(*out_BN, &out);
  aoti_torch_get_data_ptr(x_BK, &x);
  aoti_torch_get_data_ptr(weight_NK, &weight);
  int8_kernel::multiply(static_cast<int32_t*>(out), static_cast<int8_t*>(x), static_cast<int8_t*>(weight),
                        rows, out_features, in_features);
  return AOTI_TORCH_SUCCESS;
}
}
