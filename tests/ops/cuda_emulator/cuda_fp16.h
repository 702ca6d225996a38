#pragma once
#include <cuda_runtime.h>
#include <torch/headeronly/util/Half.h>

struct __half2 {
  uint16_t x, y;
};
inline float2 __half22float2(__half2 v) {
  return {c10::detail::fp16_ieee_to_fp32_value(v.x), c10::detail::fp16_ieee_to_fp32_value(v.y)};
}
inline __half2 __floats2half2_rn(float low, float high) {
  return {c10::detail::fp16_ieee_from_fp32_value(low),
          c10::detail::fp16_ieee_from_fp32_value(high)};
}
