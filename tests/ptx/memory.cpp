// Loads and stores, with the checks of every access, and what other blocks may see of a store.
//
// With delayed stores, a store to global memory is seen by its own warp at once, by the warps of its block after a barrier or once
// it is published, and by other blocks once a release or a fence of such a warp has published it, or the launch has ended; and a
// load sees what was there when its launch began, or its warp last passed a fence or an acquiring load. Relaxed, acquiring and
// releasing accesses see memory as it is. So a flag that is not released, or whose reader does not acquire, gives wrong values
// instead of right ones by chance.
#include "values.h"

namespace ptx {

Memory memory;

void Memory::publish(Bytes& bytes, u64 by) {
  ++now;
  for (const auto& [address, byte] : bytes) {
    u8* const place = reinterpret_cast<u8*>(address);
    history[address].push_back({now, *place, by});
    *place = byte;
  }
  bytes.clear();
}

namespace {

// ---- where ---------------------------------------------------------------------------------------------------------------------

std::string hexadecimal(u64 n) {
  char text[24];
  snprintf(text, sizeof text, "0x%llx", static_cast<unsigned long long>(n));
  return text;
}

template <Access::Space kSpace>
u8* place(Warp& w, const Instruction& i, int lane, u64 address, u32 bytes, bool writes, const void* data = nullptr) {
  if (address % bytes) fault(w, i, lane, "misaligned: " + std::to_string(bytes) + " bytes at " + hexadecimal(address));
  if constexpr (kSpace == Access::kShared) {
    return shared_place(w, i, lane, address, bytes, writes, data);
  } else if constexpr (kSpace == Access::kParameter) {
    const Launch& launch = *w.block->launch;
    if (address > launch.parameters.size() || bytes > launch.parameters.size() - address)
      fault(w, i, lane, "beyond the parameters: byte " + std::to_string(address));
    return const_cast<u8*>(launch.parameters.data()) + address;
  } else if constexpr (kSpace == Access::kLocal) {
    const u32 each = w.block->launch->kernel->local_bytes;
    if (address > each || bytes > each - address) fault(w, i, lane, "beyond local memory: byte " + std::to_string(address));
    return w.block->local.data() + u64(each) * (w.number * kLanes + lane) + address;
  } else {
    if (!is_allocated(address, bytes))
      fault(w, i, lane, "no such memory: " + std::to_string(bytes) + " bytes at " + hexadecimal(address));
    return reinterpret_cast<u8*>(address);
  }
}

// ---- what is seen --------------------------------------------------------------------------------------------------------------

// A byte of global memory as the warp sees it, with delayed stores: what was there when it last acquired, or what its block has
// stored since.
u8 seen(const Warp& w, u64 address, bool as_it_is) {
  for (const Bytes* own : {static_cast<const Bytes*>(&w.stored), static_cast<const Bytes*>(&w.block->stored)})
    if (const auto found = own->find(address); found != own->end()) return found->second;
  u8 byte = *reinterpret_cast<const u8*>(address);
  const auto found = memory.history.find(address);
  if (as_it_is || found == memory.history.end()) return byte;
  for (auto store = found->second.rbegin(); store != found->second.rend(); ++store) {
    if (store->by == w.block->id || store->when <= w.acquired) break;
    byte = store->before;
  }
  return byte;
}
void acquire(Warp& w) { w.acquired = memory.now; }
void release(Warp& w) {
  memory.publish(w.block->stored, w.block->id);
  memory.publish(w.stored, w.block->id);
}
void full_fence(Warp& w, const Instruction&, Mask) {
  if (!settings.delayed) return;
  release(w);
  acquire(w);
}

// ---- loads, stores -------------------------------------------------------------------------------------------------------------

// M: an element in memory, R: its register, which may be wider.
template <Access::Space kSpace, class M, class R> void load_elements(Warp& w, const Instruction& i, Mask mask) {
  const bool delayed = kSpace == Access::kGlobal && settings.delayed;
  each_of(mask, [&](int lane) {
    const u8* from = place<kSpace>(w, i, lane, address_of(w, i, lane), sizeof(M) * i.count, false);
    u8 copy[32];
    if (delayed) {
      for (size_t k = 0; k < sizeof(M) * i.count; ++k)
        copy[k] = seen(w, reinterpret_cast<u64>(from + k), i.flags != Access::kWeak);
      from = copy;
    }
    for (int k = 0; k < i.count; ++k) {
      M element;
      memcpy(&element, from + k * sizeof(M), sizeof element);
      if (i.d[k] != kNone) w.at<R>(i.d[k])[lane] = R(element);
    }
  });
  if (delayed && i.flags == Access::kOrdered) acquire(w);
}
template <Access::Space kSpace, class M, class R> void store_elements(Warp& w, const Instruction& i, Mask mask) {
  const bool delayed = kSpace == Access::kGlobal && settings.delayed;
  if (delayed && i.flags == Access::kOrdered) release(w);
  each_of(mask, [&](int lane) {
    M elements[8];
    for (int k = 0; k < i.count; ++k)
      elements[k] = M(w.at<R>(i.s[1 + k])[lane]);
    u8* to = place<kSpace>(w, i, lane, address_of(w, i, lane), sizeof(M) * i.count, true, elements);
    if (!delayed) {
      memcpy(to, elements, sizeof(M) * i.count);
      return;
    }
    const bool weak = i.flags == Access::kWeak;
    Bytes at_once;  // behind what the warp and its block have stored there before
    for (size_t k = 0; k < sizeof(M) * i.count; ++k) {
      const u64 address = reinterpret_cast<u64>(to + k);
      if (!weak) w.stored.erase(address), w.block->stored.erase(address);
      (weak ? w.stored : at_once)[address] = reinterpret_cast<const u8*>(elements)[k];
    }
    if (!weak) memory.publish(at_once, w.block->id);
  });
}

template <bool kLoads, Access::Space kSpace, class M, class R> constexpr Function kElements =
    kLoads ? load_elements<kSpace, M, R> : store_elements<kSpace, M, R>;
template <bool kLoads, Access::Space kSpace> Function of_widths(const Access& a, int width) {
  const bool sign = a.type == 's';
  switch (a.size * 16 + width) {
    case 0x12: return sign ? kElements<kLoads, kSpace, s8, u16> : kElements<kLoads, kSpace, u8, u16>;
    case 0x14: return sign ? kElements<kLoads, kSpace, s8, u32> : kElements<kLoads, kSpace, u8, u32>;
    case 0x18: return sign ? kElements<kLoads, kSpace, s8, u64> : kElements<kLoads, kSpace, u8, u64>;
    case 0x22: return kElements<kLoads, kSpace, u16, u16>;
    case 0x24: return sign ? kElements<kLoads, kSpace, s16, u32> : kElements<kLoads, kSpace, u16, u32>;
    case 0x28: return sign ? kElements<kLoads, kSpace, s16, u64> : kElements<kLoads, kSpace, u16, u64>;
    case 0x44: return kElements<kLoads, kSpace, u32, u32>;
    case 0x48: return sign ? kElements<kLoads, kSpace, s32, u64> : kElements<kLoads, kSpace, u32, u64>;
    case 0x88: return kElements<kLoads, kSpace, u64, u64>;
    default: return nullptr;
  }
}
template <bool kLoads> Function in_space(const Access& a, int width) {
  switch (a.space) {
    case Access::kShared: return of_widths<kLoads, Access::kShared>(a, width);
    case Access::kParameter: return of_widths<kLoads, Access::kParameter>(a, width);
    case Access::kLocal: return of_widths<kLoads, Access::kLocal>(a, width);
    default: return of_widths<kLoads, Access::kGlobal>(a, width);
  }
}

}  // namespace

u64 address_of(const Warp& w, const Instruction& i, int lane) {
  if (i.s[0] == kNone) return i.offset;
  return i.offset + (i.width[1] == 8 ? w.at<u64>(i.s[0])[lane] : w.at<u32>(i.s[0])[lane]);
}

// Faults where two warps touch a byte without a barrier in between, and one of them writes it: a value that is there already is no
// change, as where a layout has an element more than once.
u8* shared_place(Warp& w, const Instruction& i, int lane, u64 address, u32 bytes, bool writes, const void* data) {
  Block& block = *w.block;
  if (address > block.shared.size() || bytes > block.shared.size() - address)
    fault(w, i, lane, "beyond shared memory: byte " + std::to_string(address) + " of " + std::to_string(block.shared.size()));
  u8* const at = block.shared.data() + address;
  const bool changes = writes && !(data && memcmp(at, data, bytes) == 0);
  for (u32 k = 0; k < bytes; ++k) {
    Touched& touched = block.touched[address + k];
    const bool written = touched.written == block.barriers, read = touched.read == block.barriers;
    if ((changes || !writes) && written && touched.writer != w.number)
      fault(w, i, lane, "a race on shared memory, with a store of warp " + std::to_string(touched.writer));
    if (changes && read && touched.reader != w.number) fault(w, i, lane, "a race on shared memory, with a load of another warp");
    if (writes)
      touched.writer = w.number, touched.written = block.barriers;
    else
      touched.reader = read && touched.reader != w.number ? kSeveral : w.number, touched.read = block.barriers;
  }
  return at;
}

Function load(const Access& access, int width) { return in_space<true>(access, width); }
Function store(const Access& access, int width) { return in_space<false>(access, width); }
Function fence() { return full_fence; }

}  // namespace ptx
