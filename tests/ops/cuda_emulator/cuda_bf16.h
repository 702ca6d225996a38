#pragma once
#include <cstdint>
#include <cstring>

struct __nv_bfloat162 {
  uint16_t x, y;
};
inline uint16_t emulated_bf16(float value) {  // to nearest even, as cvt.rn.bf16.f32
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (value != value) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
inline __nv_bfloat162 __floats2bfloat162_rn(float low, float high) {
  return {emulated_bf16(low), emulated_bf16(high)};
}
