// One growing buffer per calling thread, so that concurrent calls share nothing and a call allocates nothing.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <new>

namespace pyllmq::cpu {

class Workspace {
 public:
  Workspace() = default;
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  ~Workspace() { std::free(memory_); }

  void reserve(int64_t bytes) {
    used_ = 0;
    if (bytes <= size_) return;
    std::free(memory_);
    size_ = 0;
    memory_ = static_cast<uint8_t*>(std::aligned_alloc(64, rounded(bytes)));
    if (memory_ == nullptr) throw std::bad_alloc();
    size_ = rounded(bytes);
  }
  template <class T>
  T* take(int64_t count) {
    T* begin = reinterpret_cast<T*>(memory_ + used_);
    used_ += rounded(count * static_cast<int64_t>(sizeof(T)));
    return begin;
  }
  template <class T>
  static int64_t need(int64_t count) {
    return rounded(count * static_cast<int64_t>(sizeof(T)));
  }

 private:
  static int64_t rounded(int64_t bytes) { return (bytes + 63) / 64 * 64; }
  uint8_t* memory_ = nullptr;
  int64_t size_ = 0, used_ = 0;
};

}  // namespace pyllmq::cpu
