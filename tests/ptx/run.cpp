// Launches: which block and which warp goes on, what waits for what, and what hangs.
#include <algorithm>
#include <cstdio>
#include <deque>
#include <random>
#include <stdexcept>

#include "machine.h"

namespace ptx {

Settings settings;

void fault(const Warp& w, const Instruction& i, int lane, const std::string& what) {
  const Launch& launch = *w.block->launch;
  const Size &block = w.block->index, &threads = launch.block;
  const uint32_t thread = w.number * kLanes + lane;
  char text[256];
  snprintf(text, sizeof text, ", thread (%u, %u, %u) of block (%u, %u, %u), line %d of ", thread % threads.x,
           thread / threads.x % threads.y, thread / threads.x / threads.y, block.x, block.y, block.z, i.line);
  throw std::runtime_error(what + text + launch.kernel->name + ": " + i.text);
}

// A launch that has begun.
struct Grid {
  const Launch* launch;
  std::vector<uint32_t> order;                   // of its blocks
  uint64_t started = 0, ended = 0, began = 0;    // the last: when, for what other launches have stored
  std::vector<std::pair<Bytes, uint64_t>> left;  // stored by blocks that have ended, and not seen yet
  int64_t instructions = 0;
};

namespace {

constexpr int64_t kMostInstructions = 1 << 21;  // of a warp that does not hang

std::mt19937 dice;
bool chance(unsigned one_in) { return settings.order == 2 && dice() % one_in == 0; }

// ---- a warp --------------------------------------------------------------------------------------------------------------------

void put(Warp& w, Mask lanes, uint32_t next) {
  each_of(lanes, [&](int lane) { w.next[lane] = next; });
}

// The lanes of a mask whose predicate, a byte that is 0 or 1, holds.
Mask guarded(const Warp& w, const Instruction& i, Mask mask) {
  if (i.guard == kNone) return mask;
  const uint8_t* p = w.at<uint8_t>(i.guard);
  Mask yes = 0, wrong = 0;
  for (int k = 0; k < 4; ++k) {
    uint64_t eight;
    memcpy(&eight, p + 8 * k, 8);
    yes |= Mask((eight & 0x0101010101010101) * 0x0102040810204080 >> 56) << 8 * k;
    wrong |= Mask(((eight >> 1) & 0x0101010101010101) * 0x0102040810204080 >> 56) << 8 * k;
  }
  if (wrong & mask) fault(w, i, __builtin_ctz(wrong & mask), "a predicate that nothing has set");
  return mask & (i.guard_negated ? ~yes : yes);
}

// The lanes that an instruction of the kind kTogether is for, by the first of `lanes`.
Mask members(const Warp& w, const Instruction& i, Mask lanes) { return w.at<uint32_t>(i.target)[__builtin_ctz(lanes)]; }
// That these are all of `mask`, the lanes that do it, each of which has to name the same ones.
void check_members(const Warp& w, const Instruction& i, Mask lanes, Mask mask) {
  if (!mask) return;
  const Mask beyond = mask & ~members(w, i, lanes), named = members(w, i, mask);
  if (beyond) fault(w, i, __builtin_ctz(beyond), "a lane that its mask leaves out");
  each_of(mask, [&](int lane) {
    if (w.at<Mask>(i.target)[lane] != named) fault(w, i, lane, "a mask that is not that of other lanes");
  });
}
bool waits(const Warp& w, const Instruction& i, Mask lanes) {
  if (i.kind != Kind::kTogether) return false;
  const Mask needed = members(w, i, lanes) & w.live;
  return (lanes & needed) != needed;
}

struct Group {
  Mask lanes = 0;
  uint32_t next = 0, until = ~0u;  // the instruction, and that at which other lanes are
};
// The lanes that go on: of the groups of lanes at one instruction that need not wait for others, the one that is furthest behind,
// so that it can catch up with the others; by chance another.
Group chosen(const Warp& w) {
  Group groups[kLanes];
  int count = 0;
  const std::vector<Instruction>& code = w.block->launch->kernel->code;
  for (Mask rest = w.live & ~w.at_barrier; rest;) {
    Group& group = groups[count++];
    group.next = w.next[__builtin_ctz(rest)];
    each_of(rest, [&](int lane) { group.lanes |= w.next[lane] == group.next ? Mask(1) << lane : 0; });
    rest &= ~group.lanes;
  }
  std::sort(groups, groups + count, [](const Group& a, const Group& b) { return a.next < b.next; });
  Group found;
  for (int k = 0; k < count; ++k)
    if (!waits(w, code[groups[k].next], groups[k].lanes)) {
      found = groups[k];
      if (!chance(4)) break;
    }
  for (int k = 0; k < count; ++k)
    if (groups[k].next > found.next) {
      found.until = groups[k].next;
      break;
    }
  return found;
}

// Runs a warp for a number of instructions; false if it could do nothing.
bool run(Warp& w, int turn) {
  const std::vector<Instruction>& code = w.block->launch->kernel->code;
  bool moved = false;
  w.yielded = false;
  while (turn > 0 && !w.yielded) {
    const Group group = chosen(w);
    const Mask lanes = group.lanes;
    if (!lanes) return moved;
    if (w.left < 0)
      fault(w, code[group.next], __builtin_ctz(lanes), "more than " + std::to_string(kMostInstructions) + " instructions: a hang");
    uint32_t at = group.next;
    for (bool together = true; together;) {
      const Instruction& i = code[at];
      if (waits(w, i, lanes)) break;
      const Mask mask = guarded(w, i, lanes);
      moved = true;
      --turn, --w.left, ++w.block->grid->instructions;
      switch (i.kind) {
        case Kind::kTogether: check_members(w, i, lanes, mask); [[fallthrough]];
        case Kind::kOrdered: w.yielded = i.kind == Kind::kOrdered; [[fallthrough]];
        case Kind::kPlain:
          if (mask) i.run(w, i, mask);
          ++at;
          break;
        case Kind::kBranch:
          if (mask == lanes) {
            at = i.target;
          } else {
            ++at;
            if (mask) put(w, mask, i.target), put(w, lanes & ~mask, at), together = false;
          }
          break;
        case Kind::kExit:
          w.live &= ~mask;
          put(w, lanes & ~mask, at + 1), together = false;
          break;
        case Kind::kBarrier:
          w.at_barrier |= mask;
          put(w, lanes, at + 1), together = false;
          break;
      }
      if (together && (at >= group.until || turn <= 0 || w.yielded)) break;
      if (!together) at = ~0u;
    }
    if (at != ~0u) put(w, lanes, at);
  }
  return moved;
}

// ---- a block -------------------------------------------------------------------------------------------------------------------

uint32_t special(const Launch& launch, const Size& block, uint32_t thread, int number) {
  const Size& threads = launch.block;
  const Size place = {thread % threads.x, thread / threads.x % threads.y, thread / threads.x / threads.y};
  const Size all[] = {place, threads, block, launch.grid, {thread % kLanes, thread / kLanes}};
  const Size& found = all[number / 3];
  return number % 3 == 0 ? found.x : number % 3 == 1 ? found.y : found.z;
}

constexpr uint8_t kUnwritten = 0xFF;  // what nothing has written is NaN, and no address

void start(Block& b, Grid& grid) {
  const Launch& launch = *grid.launch;
  Kernel& kernel = *launch.kernel;
  if (!grid.started) grid.began = memory.now;
  const uint32_t number = grid.order[grid.started++], threads = launch.block.count(), warps = (threads + kLanes - 1) / kLanes;
  static uint64_t blocks = 0;
  b.id = ++blocks, b.launch = &launch, b.grid = &grid;
  b.index = {number % launch.grid.x, number / launch.grid.x % launch.grid.y, number / launch.grid.x / launch.grid.y};
  b.shared.assign(launch.shared_bytes(), kUnwritten);
  b.touched.assign(launch.shared_bytes(), {});
  b.local.assign(uint64_t(kernel.local_bytes) * warps * kLanes, kUnwritten);
  b.registers.assign(uint64_t(kernel.register_bytes) * warps + 64, kUnwritten);
  b.barriers = 1;
  b.stored.clear();
  b.warps.resize(warps);
  uint8_t* const registers = b.registers.data() + (64 - reinterpret_cast<uintptr_t>(b.registers.data()) % 64) % 64;
  for (uint32_t n = 0; n < warps; ++n) {
    Warp& w = b.warps[n];
    w.bases[0] = registers + uint64_t(kernel.register_bytes) * n, w.bases[1] = kernel.constants.data();
    w.block = &b, w.number = n;
    w.all = w.live = threads - kLanes * n >= kLanes ? kAll : (Mask(1) << (threads - kLanes * n)) - 1;
    w.at_barrier = 0, w.yielded = false, w.acquired = grid.began, w.left = kMostInstructions;
    w.stored.clear();
    std::fill(std::begin(w.next), std::end(w.next), 0);
    for (const Kernel::Special& each : kernel.specials)
      for (uint32_t lane = 0; lane < kLanes; ++lane)
        w.at<uint32_t>(each.place)[lane] = special(launch, b.index, kLanes * n + lane, each.number);
  }
}

// Lets the threads go on that wait at the barrier, once all are there.
bool pass_barrier(Block& b) {
  bool waiting = false;
  uint32_t waits_at = 0;  // one of the barriers
  for (const Warp& w : b.warps) {
    if (w.live & ~w.at_barrier) return false;
    if (w.at_barrier) waiting = true, waits_at = w.next[__builtin_ctz(w.at_barrier)] - 1;
  }
  if (!waiting) return false;
  uint64_t acquired = 0;
  const std::vector<Instruction>& code = b.launch->kernel->code;
  for (Warp& w : b.warps) {
    if (w.at_barrier != w.all)
      fault(w, code[waits_at], __builtin_ctz(w.all & ~w.at_barrier), "a barrier behind the end of this thread");
    each_of(w.all, [&](int lane) {
      if (w.next[lane] != w.next[0]) fault(w, code[w.next[lane] - 1], lane, "another barrier than that of other lanes");
    });
    w.at_barrier = 0;
    b.stored.merge(w.stored);
    for (const auto& [address, byte] : w.stored)  // what a warp had stored there before
      b.stored[address] = byte;
    w.stored.clear();
    acquired = std::max(acquired, w.acquired);
  }
  for (Warp& w : b.warps)
    w.acquired = acquired;
  ++b.barriers;
  return true;
}

enum class Turn { kStill, kMoved, kEnded };  // the first: all warps wait, at a barrier or in a loop

Turn take_turn(Block& b) {
  bool moved = false;
  for (size_t n = 0; n < b.warps.size(); ++n) {
    Warp& w = b.warps[settings.order == 2 ? dice() % b.warps.size() : settings.order == 1 ? b.warps.size() - 1 - n : n];
    if (!(w.live & ~w.at_barrier)) continue;
    const bool did = run(w, settings.order == 2 ? 1 + dice() % 200 : settings.turn);
    moved |= did && !(w.yielded && w.live);
  }
  moved |= pass_barrier(b);
  if (std::none_of(b.warps.begin(), b.warps.end(), [](const Warp& w) { return w.live; })) return Turn::kEnded;
  return moved ? Turn::kMoved : Turn::kStill;
}

// ---- launches ------------------------------------------------------------------------------------------------------------------

std::vector<uint32_t> block_order(uint64_t count) {
  std::vector<uint32_t> order(count);
  for (uint64_t n = 0; n < count; ++n)
    order[n] = settings.order == 1 ? count - 1 - n : n;
  if (settings.order == 2) std::shuffle(order.begin(), order.end(), dice);
  return order;
}

void end(Block& b) {
  Grid& grid = *b.grid;
  ++grid.ended;
  grid.left.emplace_back(std::move(b.stored), b.id);  // from before the last barrier
  for (Warp& w : b.warps)
    grid.left.emplace_back(std::move(w.stored), b.id);
}

[[noreturn]] void hang(const std::vector<Block*>& running) {
  for (const Warp& w : running[0]->warps)  // of which none can go on
    if (w.live) {
      const int lane = __builtin_ctz(w.live);
      fault(w, running[0]->launch->kernel->code[w.next[lane]], lane, w.at_barrier ? "a hang, at a barrier" : "a hang");
    }
  __builtin_unreachable();  // a block without such a warp has ended
}

}  // namespace

void run(const std::vector<std::vector<const Launch*>>& streams) {
  dice.seed(settings.seed);
  memory.history.clear();
  std::vector<std::deque<Grid>> grids(streams.size());
  for (size_t s = 0; s < streams.size(); ++s)
    for (const Launch* launch : streams[s]) {
      parse_body(*launch->kernel);
      grids[s].emplace_back();
      grids[s].back().launch = launch, grids[s].back().order = block_order(launch->grid.count());
      ++launch->kernel->launches;
    }
  static thread_local std::vector<std::unique_ptr<Block>> pool;
  while (pool.size() < static_cast<size_t>(settings.resident))
    pool.push_back(std::make_unique<Block>());
  std::vector<Block*> idle, running;
  for (int n = settings.resident; n-- > 0;)
    idle.push_back(pool[n].get());
  for (uint64_t turn = 0, still = 0;; ++turn) {
    // The first launch of each stream that has not ended may start blocks.
    std::vector<Grid*> ready;
    for (std::deque<Grid>& stream : grids) {
      if (!stream.empty() && stream[0].ended == stream[0].order.size()) {
        for (auto& [bytes, by] : stream[0].left)
          memory.publish(bytes, by);
        stream[0].launch->kernel->instructions += stream[0].instructions;
        stream.pop_front();
      }
      if (!stream.empty() && stream[0].started < stream[0].order.size()) ready.push_back(&stream[0]);
    }
    while (!idle.empty() && !ready.empty()) {
      const size_t at = settings.order == 2 ? dice() % ready.size() : turn % ready.size();
      start(*idle.back(), *ready[at]);
      running.push_back(idle.back());
      idle.pop_back();
      if (ready[at]->started == ready[at]->order.size()) ready.erase(ready.begin() + at);
    }
    if (running.empty()) {
      if (std::all_of(grids.begin(), grids.end(), [](const std::deque<Grid>& stream) { return stream.empty(); })) return;
      continue;
    }
    const size_t at = settings.order == 2 ? dice() % running.size() : turn % running.size();
    const Turn took = take_turn(*running[at]);
    if (took == Turn::kEnded) {
      end(*running[at]);
      idle.push_back(running[at]);
      running.erase(running.begin() + at);
    }
    still = took == Turn::kStill ? still + 1 : 0;
    if (still > 20000 + 200 * running.size()) hang(running);
  }
}

}  // namespace ptx
