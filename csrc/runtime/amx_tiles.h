// AMX's eight tiles. `static` because only files compiled for AMX may hold this code.
#pragma once
#include <immintrin.h>

#include <cstdint>

namespace pyllmq::cpu {

// Tiles of 64 bytes a row: 0 to 6 of so many rows, 7 of 16.
static inline void begin_tiles(int64_t rows) {
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  } config;
  for (int tile = 0; tile < 8; ++tile) {
    config.row_bytes[tile] = 64;
    config.rows[tile] = static_cast<uint8_t>(tile < 7 ? rows : 16);
  }
  asm volatile("" ::"r"(&config) : "memory");  // gcc 12 believes that the next instruction reads 8 bytes of the 64
  _tile_loadconfig(&config);
}

static inline void end_tiles() { _tile_release(); }

}  // namespace pyllmq::cpu
