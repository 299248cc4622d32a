// A PTX machine on the host: it runs the kernels of a PTX text warp by warp, 32 lanes in lock step under a mask.
//
//   parse.cpp       a text becomes a Module of Kernels, lists of Instructions with their operands and the function that does each
//   arithmetic.cpp  the functions of values
//   memory.cpp      of memory, with the checks of every access, and what other blocks may see of a store
//   lanes.cpp       of what the lanes of a warp do together: shuffles, matrices
//   run.cpp         launches: which block and which warp goes on, barriers, what hangs
//   runtime.cpp     what nvcc's host code calls of the CUDA runtime, the memory that a kernel may touch, and what Python calls
//
// It shows that the code ptxas is given is right: values, masks, barriers, flags, bounds, alignment, the geometry of a launch. It
// does not show ptxas and SASS, speed, or special functions bit by bit: these are exact here, or as far off as the PTX ISA allows.
//
// A fault ends the launch with an error that names the kernel, the line of the PTX and the thread.
#pragma once
#include <stdint.h>

#include <cstring>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

namespace ptx {

// ---- kernels -------------------------------------------------------------------------------------------------------------------

using Mask = uint32_t;  // a bit for each lane of a warp
constexpr int kLanes = 32;
constexpr Mask kAll = ~Mask(0);

template <class F> void each_of(Mask mask, F f) {
  for (; mask; mask &= mask - 1)
    f(__builtin_ctz(mask));
}

struct Warp;
struct Instruction;
using Function = void (*)(Warp&, const Instruction&, Mask);

// Where the 32 values of an operand lie, one behind the other: twice an offset into the warp's registers, or that of a constant of
// the kernel's and 1.
using Operand = uint32_t;
constexpr Operand kNone = ~0u;
constexpr int kMostOperands = 9;  // a vector of eight and its address

enum class Kind : uint8_t {
  kPlain,
  kOrdered,   // a plain one after which other warps get their turn: it may wait for what they do
  kTogether,  // done once all lanes of its own mask, `target`, are there
  kBranch,
  kBarrier,
  kExit,
};

struct Instruction {
  Function run = nullptr;
  Kind kind = Kind::kPlain;
  bool guard_negated = false;
  uint8_t count = 1;          // of a load or a store: elements
  uint8_t width[2] = {0, 0};  // bytes of a register of the data, and of the address or the source; where the type does not say
  uint32_t flags = 0;         // what else the function wants to know
  Operand guard = kNone;
  uint32_t target = 0;  // of a branch
  Operand d[8] = {kNone, kNone, kNone, kNone, kNone, kNone, kNone, kNone};
  Operand s[kMostOperands] = {kNone, kNone, kNone, kNone, kNone, kNone, kNone, kNone, kNone};
  int64_t offset = 0;  // of an address
  int line = 0;
  std::string text;
};

struct Parameter {
  std::string name;
  uint32_t offset, size;
};

struct Kernel {
  std::string name;
  std::vector<Parameter> parameters;
  uint32_t parameter_bytes = 0, register_bytes = 0, shared_bytes = 0, local_bytes = 0;
  uint32_t most_threads = 1024;
  std::vector<Instruction> code;   // once it has been launched; until then `body` has it as text
  std::vector<uint8_t> constants;  // 32 times each
  struct Special {
    int number;  // of a special register, in the order of kSpecials
    Operand place;
  };
  std::vector<Special> specials;
  std::string body, module_variables;
  int line = 0;  // of the body, in its text
  int64_t launches = 0, instructions = 0;
};

extern const char* const kSpecials[14];

struct Module {
  std::unordered_map<std::string, std::unique_ptr<Kernel>> kernels;
};

std::unique_ptr<Module> parse(const std::string& text);
void parse_body(Kernel& kernel);

// ---- the functions of instructions ---------------------------------------------------------------------------------------------

// An entry of the table of opcodes: the function, and bytes of each operand's register; 0: whatever the register's are, which the
// function finds in `width`.
struct Opcode {
  Function run = nullptr;
  uint8_t result = 0, sources[4] = {0, 0, 0, 0};
  uint32_t flags = 0;
};
using Opcodes = std::unordered_map<std::string, Opcode>;  // by name with everything but the vector's length: "fma.rn.f32"
void enter_arithmetic(Opcodes& opcodes);
void enter_lanes(Opcodes& opcodes);

struct Access {
  enum Space : uint8_t { kGlobal, kShared, kParameter, kLocal } space = kGlobal;
  enum Order : uint8_t { kWeak, kRelaxed, kOrdered } order = kWeak;  // for `flags`; the last: a load acquires, a store releases
  char type = 'b';                                                   // s, u, b or f
  int size = 0;
};
Function load(const Access& access, int width);
Function store(const Access& access, int width);
Function fence();

// ---- a launch ------------------------------------------------------------------------------------------------------------------

struct Size {
  uint32_t x = 1, y = 1, z = 1;
  uint64_t count() const { return uint64_t(x) * y * z; }
};

struct Launch {
  Kernel* kernel;
  Size grid, block;
  uint32_t dynamic_shared = 0;
  std::vector<uint8_t> parameters;
  uint32_t shared_bytes() const { return (kernel->shared_bytes + 15) / 16 * 16 + dynamic_shared; }
};

using Bytes = std::unordered_map<uint64_t, uint8_t>;  // of global memory, by address
struct Block;

struct Warp {
  uint8_t* bases[2];  // the registers, and the constants
  Block* block;
  int number;
  Mask all, live, at_barrier;  // of those that there are, those that have not ended, and that wait
  uint32_t next[kLanes];       // instruction of each lane
  bool yielded;
  int64_t left;       // instructions before it counts as hanging
  Bytes stored;       // with delayed stores: what no other warp sees yet
  uint64_t acquired;  // the moment since when it has to see what others had stored

  template <class T> T* at(Operand operand) const { return reinterpret_cast<T*>(bases[operand & 1] + (operand >> 1)); }
};

// Who has touched a byte of shared memory since which barrier.
struct Touched {
  int16_t writer = -1, reader = -1;
  uint32_t written = 0, read = 0;
};
constexpr int16_t kSeveral = 0x7FFF;

struct Block {
  uint64_t id;  // of no other block that has run
  const Launch* launch;
  struct Grid* grid;
  Size index;
  std::vector<uint8_t> shared, local, registers;
  std::vector<Touched> touched;
  uint32_t barriers;
  std::vector<Warp> warps;
  Bytes stored;  // of warps that a barrier has brought together
};

// What the adversary does. From FASTGEN_PTX, or `fastgen_ptx_settings`: "order=2 seed=5 resident=8 delayed=1 perturbed=1 turn=200".
struct Settings {
  int order = 0;  // in which blocks start and take turns, and warps: 0 forward, 1 backward, 2 at random
  int seed = 0;
  int resident = 1;  // blocks at a time
  int delayed = 0;   // whether stores stay unseen until they are released, and loads see what was there when the warp last acquired
  int perturbed = 0;  // whether approximate functions are as far off as they may be
  int turn = 100000;  // instructions of a warp before another goes on
};
extern Settings settings;

// Global memory as another block may see it, of all launches that run at a time.
struct Memory {
  uint64_t now = 1;
  struct Stored {
    uint64_t when;
    uint8_t before;
    uint64_t by;  // the block's own number
  };
  std::unordered_map<uint64_t, std::vector<Stored>> history;  // with delayed stores, by address

  void publish(Bytes& bytes, uint64_t by);
};
extern Memory memory;

// Streams of launches: those of one stream run one after the other, those of several side by side. Throws std::runtime_error.
void run(const std::vector<std::vector<const Launch*>>& streams);

[[noreturn]] void fault(const Warp& warp, const Instruction& instruction, int lane, const std::string& what);

// Whether global memory has these bytes; in runtime.cpp.
bool is_allocated(uint64_t address, uint64_t bytes);

}  // namespace ptx
