// What the layouts of all formats and devices have in common: one relocatable blob (offsets, no pointers), made on the host,
// whose header says with what magic number and version it begins.
#pragma once
#include <cstdint>
#include <string>

namespace pyllmq {

using Refuse = void (*)(const std::string& why);  // throws

template <class T>
T* at(uint8_t* base, int64_t offset) {
  return reinterpret_cast<T*>(base + offset);
}
template <class T>
const T* at(const uint8_t* base, int64_t offset) {
  return reinterpret_cast<const T*>(base + offset);
}

inline bool is_placed(const void* layout, int64_t alignment) {
  return layout != nullptr && reinterpret_cast<uintptr_t>(layout) % alignment == 0;
}

// The header of a blob that is whole as far as it says.
template <class Header>
const Header& checked_header(Refuse refuse, const void* layout, int64_t layout_bytes, int64_t alignment) {
  const auto bytes = [](int64_t count) { return std::to_string(count) + " bytes"; };
  if (!is_placed(layout, alignment))
    refuse("the buffer must not be null and must be aligned to " + bytes(alignment) + "; copy it to an aligned buffer");
  if (layout_bytes < static_cast<int64_t>(sizeof(Header)))
    refuse("the buffer has " + bytes(layout_bytes) + ", less than its header, which takes at least " + bytes(sizeof(Header)) +
           "; pack the weight again");
  const auto& h = *static_cast<const Header*>(layout);
  if (h.magic != Header::kMagic)
    refuse("this buffer was not packed by this back end for this format, or is damaged (wrong magic number)");
  if (h.version != Header::kVersion)
    refuse("version " + std::to_string(h.version) + " cannot be read, only version " + std::to_string(Header::kVersion) +
           "; pack the weight again");
  if (h.bytes != layout_bytes)
    refuse("the buffer has " + bytes(layout_bytes) + " but its header says " + bytes(h.bytes) + "; it was cut or padded");
  return h;
}

// Refuses a buffer that a layout of `needed` bytes is not to be packed into.
inline void check_room(Refuse refuse, const void* layout, int64_t layout_bytes, int64_t needed, int64_t alignment) {
  if (!is_placed(layout, alignment) || layout_bytes != needed)
    refuse("the buffer has " + std::to_string(layout_bytes) + " bytes; this weight needs " + std::to_string(needed) +
           ", aligned to " + std::to_string(alignment));
}

// FNV-1a over words of 8 bytes.
inline uint64_t hash_words(const void* data, int64_t bytes, uint64_t hash = 0xCBF29CE484222325u) {
  for (const auto* word = static_cast<const uint8_t*>(data); bytes >= 8; bytes -= 8, word += 8)
    hash = (hash ^ *at<uint64_t>(word, 0)) * 0x100000001B3u;
  return hash;
}

}  // namespace pyllmq
