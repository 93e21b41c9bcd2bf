#pragma once

// What the CPU kernels share: vectors as the compiler knows them, and activations on them. Everything is inlined into
// functions compiled for one instruction set each, and is local to the file that includes it.

#include <c10/util/Exception.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>

namespace bbfast {
namespace {

#define BBFAST_INLINE inline __attribute__((always_inline))
#define BBFAST_INLINE_LAMBDA __attribute__((always_inline))
#define BBFAST_UNROLL_ALL _Pragma("GCC unroll 32")
#define BBFAST_UNROLL _Pragma("GCC unroll 8")  // or sums would live in memory, not in registers

enum class Act { identity, relu, relu6, hardswish, silu, gelu };

// ---- vectors ------------------------------------------------------------------------------------------------

typedef float Vec4 __attribute__((vector_size(16)));
typedef float Vec8 __attribute__((vector_size(32)));
typedef float Vec16 __attribute__((vector_size(64)));
typedef int32_t Int4 __attribute__((vector_size(16)));
typedef int32_t Int8 __attribute__((vector_size(32)));
typedef int32_t Int16 __attribute__((vector_size(64)));

// `Narrower` takes the channels that are left when they no longer fill a vector.
template <class V> struct Traits;
template <> struct Traits<float> { using Int = int32_t; using Narrower = float; };
template <> struct Traits<Vec4> { using Int = Int4; using Narrower = float; };
template <> struct Traits<Vec8> { using Int = Int8; using Narrower = Vec4; };
template <> struct Traits<Vec16> { using Int = Int16; using Narrower = Vec8; };

template <class V> constexpr int64_t lanes = sizeof(V) / sizeof(float);

// Through references, not values: passing wide vectors by value has no stable ABI below AVX.
template <class V> BBFAST_INLINE void load(V& v, const float* p) { std::memcpy(&v, p, sizeof(V)); }
template <class V> BBFAST_INLINE void store(float* p, const V& v) { std::memcpy(p, &v, sizeof(V)); }

// ---- activations, in place on one vector --------------------------------------------------------------------

// exp for v <= 88: 2^n times a polynomial in the rest, |rest| <= ln2 / 2; NaN stays NaN.
template <class V> BBFAST_INLINE void exp_in_place(V& v) {
  using Int = typename Traits<V>::Int;
  const V lowest = V{} - 87.0f, highest = V{} + 88.0f;
  v = v < lowest ? lowest : v;
  v = v > highest ? highest : v;
  const V rounder = V{} + 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  const V shifted = v * 1.44269504f + rounder;
  const V n = shifted - rounder;
  const V r = (v - n * 0.693145752f) - n * 1.42860677e-6f;
  V p = r * 1.98412698e-4f + 1.38888889e-3f;  // Taylor's coefficients; the first term left out is below 6e-9
  p = p * r + 8.33333333e-3f;
  p = p * r + 4.16666667e-2f;
  p = p * r + 1.66666667e-1f;
  p = p * r + 0.5f;
  p = p * (r * r) + r + 1.0f;
  Int bits, exponent;
  std::memcpy(&bits, &p, sizeof(V));
  std::memcpy(&exponent, &shifted, sizeof(V));
  bits += exponent << 23;
  std::memcpy(&v, &bits, sizeof(V));
}

template <class V> BBFAST_INLINE void silu(V& v) {
  V e = -v;
  exp_in_place(e);
  v = v / (e + 1.0f);
}

// x * Phi(x), with Phi(-a) = erfc(a / sqrt 2) / 2 and erfc(b) = exp(-b^2) t Q(t), t = 1 / (1 + 0.4 b). Q is a
// minimax fit of degree 8 on 0 <= b <= 9.4, relative error 6e-8.
template <class V> BBFAST_INLINE void gelu(V& v) {
  const V a = v < V{} ? -v : v;
  const V b = a * 0.707106781f;
  const V t = 1.0f / (b * 0.4f + 1.0f);
  V q = t * 0.0400544815f - 0.134419307f;
  q = q * t + 0.0716318116f;
  q = q * t + 0.102305546f;
  q = q * t + 0.0696920604f;
  q = q * t + 0.197754323f;
  q = q * t + 0.200751066f;
  q = q * t + 0.226605594f;
  q = q * t + 0.225624487f;
  V e = -b * b;
  exp_in_place(e);
  const V lower = e * t * q * 0.5f;
  v = v * (v < V{} ? lower : 1.0f - lower);
}

template <class V> BBFAST_INLINE void clamp(V& v, float low, float high) {
  const V l = V{} + low, h = V{} + high;
  v = v < l ? l : v;  // NaN compares false and passes
  v = v > h ? h : v;
}

// ---- instruction sets -----------------------------------------------------------------------------------------

// What this machine runs quickest of a kernel compiled for each of the three.
#if defined(__x86_64__)
template <class Kernel> Kernel best_of(const Kernel& baseline, const Kernel& avx2, const Kernel& avx512) {
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return baseline;
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") ? avx512 : avx2;
}
#endif

// ---- names --------------------------------------------------------------------------------------------------

[[maybe_unused]] Act parse_act(const std::string& name) {
  static constexpr const char* NAMES[] = {"identity", "relu", "relu6", "hardswish", "silu", "gelu"};
  for (int i = 0; i < 6; ++i) {
    if (name == NAMES[i]) return static_cast<Act>(i);
  }
  TORCH_CHECK_VALUE(false, "act='", name, "' is not known; allowed: identity, relu, relu6, hardswish, silu, gelu");
}

}  // namespace
}  // namespace bbfast
