// A PTX text becomes a module. Bodies of kernels are parsed at their first launch, since a library has hundreds and a test needs
// few. What is not understood is refused, with its line: nothing is guessed, and nothing passed over but hints.
#include <algorithm>
#include <cctype>
#include <cstdlib>
#include <map>
#include <set>
#include <stdexcept>

#include "machine.h"

namespace ptx {

const char* const kSpecials[14] = {"%tid.x",   "%tid.y",   "%tid.z",    "%ntid.x",   "%ntid.y",   "%ntid.z", "%ctaid.x",
                                   "%ctaid.y", "%ctaid.z", "%nctaid.x", "%nctaid.y", "%nctaid.z", "%laneid", "%warpid"};

namespace {

using std::string;
using std::vector;
using Words = vector<string>;

// ---- texts ---------------------------------------------------------------------------------------------------------------------

bool is_space(char c) { return isspace(static_cast<unsigned char>(c)); }
string trimmed(const string& s) {
  size_t begin = 0, end = s.size();
  while (begin < end && is_space(s[begin]))
    ++begin;
  while (begin < end && is_space(s[end - 1]))
    --end;
  return s.substr(begin, end - begin);
}
// By commas, or by other characters, outside brackets.
Words split(const string& s, char by = ',') {
  Words parts(1);
  int depth = 0;
  for (char c : s) {
    depth += (c == '{' || c == '[' || c == '(') - (c == '}' || c == ']' || c == ')');
    if (c == by && depth == 0)
      parts.emplace_back();
    else
      parts.back() += c;
  }
  for (string& part : parts)
    part = trimmed(part);
  return parts;
}
Words words_of(const string& s) {
  Words words;
  for (const string& word : split(s, ' '))
    if (!word.empty()) words.push_back(word);
  return words;
}
// With spaces in their place, so that lines keep their numbers.
string without_comments(string s) {
  for (size_t at = 0; (at = s.find('/', at)) != string::npos; ++at) {
    const bool line = s[at + 1] == '/';
    if (!line && s[at + 1] != '*') continue;
    size_t end = line ? s.find('\n', at) : s.find("*/", at) + 2;
    for (end = end < s.size() ? end : s.size(); at < end; ++at)
      if (s[at] != '\n') s[at] = ' ';
    --at;
  }
  return s;
}
bool begins(const string& s, const char* with, size_t at = 0) { return s.compare(at, strlen(with), with) == 0; }
size_t closing(const string& s, size_t open, char left, char right) {
  int depth = 0;
  for (size_t at = open; at < s.size(); ++at) {
    depth += (s[at] == left) - (s[at] == right);
    if (depth == 0) return at;
  }
  throw std::runtime_error("PTX without a closing " + string(1, right));
}
int line_of(const string& s, size_t at) { return 1 + static_cast<int>(std::count(s.begin(), s.begin() + at, '\n')); }

int bytes_of(const string& type) {  // "u32", "f16x2", "pred"; 0: no type
  if (type == "pred") return 1;
  const size_t digits = type.find_first_of("0123456789");
  if (digits == string::npos || digits > 2 || !strchr("bsuf", type[0])) return 0;
  const int bytes = atoi(type.c_str() + digits) / 8;
  return type.size() > 2 && type.compare(type.size() - 2, 2, "x2") == 0 ? 2 * bytes : bytes;
}
uint32_t aligned(uint32_t n, uint32_t to) { return (n + to - 1) / to * to; }

struct Variable {
  string name;
  uint32_t offset, size;
};
// `.align 8 .b8 name[64]`, `.u64 .ptr .global .align 1 name`: behind the `total` bytes that there are.
Variable declared(const string& text, uint32_t& total) {
  uint32_t alignment = 0, element = 1, count = 1;
  bool pointer = false;
  string name;
  const Words words = words_of(text);
  for (size_t k = 0; k < words.size(); ++k) {
    if (words[k] == ".ptr") {
      pointer = true;
    } else if (words[k] == ".align") {
      ++k;
      if (!pointer) alignment = atoi(words[k].c_str());  // else it is that of what it points to
    } else if (words[k][0] == '.') {
      if (const int bytes = bytes_of(words[k].substr(1))) element = bytes;
    } else {
      name = words[k];
    }
  }
  if (const size_t open = name.find('['); open != string::npos) {
    count = atoi(name.c_str() + open + 1);  // none for memory whose size comes with the launch
    name.resize(open);
  }
  total = aligned(total, alignment ? alignment : element);
  const Variable found{name, total, element * count};
  total += found.size;
  return found;
}

// ---- a body --------------------------------------------------------------------------------------------------------------------

const Opcodes& opcodes() {
  static const Opcodes all = [] {
    Opcodes made;
    enter_arithmetic(made);
    enter_lanes(made);
    return made;
  }();
  return all;
}

class Body {
 public:
  explicit Body(Kernel& kernel) : kernel_(kernel), scopes_(1) {
    for (const Parameter& each : kernel.parameters)
      addresses_[each.name] = each.offset;
  }

  void parse() {
    variables(kernel_.module_variables);
    const string& text = kernel_.body;
    for (size_t at = 0; at < text.size();) {
      const char c = text[at];
      line_ += c == '\n';
      if (is_space(c) || c == ';') {
        ++at;
      } else if (c == '{') {
        scopes_.emplace_back(), ++at;
      } else if (c == '}') {
        scopes_.pop_back(), ++at;
      } else if (begins(text, ".loc", at) || begins(text, ".file", at)) {
        at = text.find('\n', at);
      } else if (const size_t end = label_end(at)) {
        labels_[text.substr(at, end - at)] = kernel_.code.size();
        at = end + 1;
      } else {
        const size_t stop = text.find(';', at);
        string statement = text.substr(at, stop - at);
        const int lines = static_cast<int>(std::count(statement.begin(), statement.end(), '\n'));
        for (char& each : statement)
          if (is_space(each)) each = ' ';
        statement_ = trimmed(statement);
        directive_or_instruction();
        line_ += lines;
        at = stop + 1;
      }
    }
    for (auto& [index, label] : branches_) {
      line_ = kernel_.code[index].line - kernel_.line, statement_ = kernel_.code[index].text;
      if (!labels_.count(label)) refuse("no label " + label);
      kernel_.code[index].target = labels_[label];
    }
    Instruction end;
    end.kind = Kind::kExit;
    statement_ = "the end", push(end);
  }

 private:
  struct Register {
    int bytes;
    Operand place;
  };
  struct Scope {
    std::unordered_map<string, Register> registers;
    std::unordered_map<string, int> families;  // %r<20>: bytes of each by "%r"
  };

  [[noreturn]] void refuse(const string& why) const {
    throw std::runtime_error("PTX not understood, line " + std::to_string(kernel_.line + line_) + " of " + kernel_.name + ": " +
                             why + ": " + statement_);
  }
  size_t label_end(size_t at) const {
    const string& text = kernel_.body;
    size_t end = at;
    while (end < text.size() && (isalnum(static_cast<unsigned char>(text[end])) || strchr("_$%", text[end])))
      ++end;
    return end > at && text[end] == ':' && text[end + 1] != ':' ? end : 0;
  }

  void directive_or_instruction() {
    if (begins(statement_, ".reg")) {
      const Words words = words_of(statement_);
      const int bytes = bytes_of(words[1].substr(1));
      const size_t names = statement_.find(words[1]) + words[1].size();
      if (!bytes) refuse("no such type");
      for (const string& name : split(statement_.substr(names)))
        if (const size_t open = name.find('<'); open != string::npos)
          scopes_.back().families[name.substr(0, open)] = bytes;
        else
          scopes_.back().registers[name] = {bytes, new_register(bytes)};
    } else if (begins(statement_, ".shared") || begins(statement_, ".local")) {
      variables(statement_);
    } else if (statement_[0] != '.') {
      instruction();
    } else if (!begins(statement_, ".pragma")) {
      refuse("a directive");
    }
  }
  void variables(const string& text) {
    for (const string& each : split(text, ';')) {
      if (each.empty()) continue;
      const bool local = begins(each, ".local");
      const Variable found = declared(each, local ? kernel_.local_bytes : kernel_.shared_bytes);
      if (!local && found.size && sized_by_launch_) refuse("shared memory behind that whose size comes with the launch");
      sized_by_launch_ |= !local && !found.size;
      addresses_[found.name] = found.offset;
    }
  }

  // ---- operands

  Operand new_register(int bytes) {
    const uint32_t at = kernel_.register_bytes;
    kernel_.register_bytes += bytes * kLanes;
    return 2 * at;
  }
  const Register* find_register(const string& name) {
    for (size_t s = scopes_.size(); s-- > 0;) {
      if (const auto found = scopes_[s].registers.find(name); found != scopes_[s].registers.end()) return &found->second;
      size_t digits = name.size();
      while (digits > 0 && isdigit(static_cast<unsigned char>(name[digits - 1])))
        --digits;
      const auto family = scopes_[s].families.find(name.substr(0, digits));
      if (digits < name.size() && family != scopes_[s].families.end())
        return &(scopes_[s].registers[name] = {family->second, new_register(family->second)});
    }
    for (int k = 0; k < static_cast<int>(std::size(kSpecials)); ++k)
      if (name == kSpecials[k]) {
        const Register& made = scopes_[0].registers[name] = {4, new_register(4)};
        kernel_.specials.push_back({k, made.place});
        return &made;
      }
    return nullptr;
  }
  Operand constant(int bytes, uint64_t value) {
    const auto [found, fresh] = constants_.try_emplace({bytes, value}, static_cast<uint32_t>(kernel_.constants.size()));
    if (fresh) {
      kernel_.constants.resize(found->second + bytes * kLanes);
      for (int lane = 0; lane < kLanes; ++lane)
        memcpy(kernel_.constants.data() + found->second + bytes * lane, &value, bytes);
    }
    return 2 * found->second + 1;
  }
  // A number, or the address of a variable, plus a number.
  uint64_t value(const string& text) {
    if (text[0] == '-') return -value(text.substr(1));
    if (isdigit(static_cast<unsigned char>(text[0]))) {
      const bool real = text[0] == '0' && text[1] && strchr("fFdD", text[1]);  // its bits
      char* end;
      const uint64_t number = strtoull(text.c_str() + 2 * real, &end, real ? 16 : 0);
      if (strcmp(end, "") && strcmp(end, "U")) refuse("no such number: " + text);
      return number;
    }
    const size_t plus = text.find('+');
    const auto found = addresses_.find(trimmed(text.substr(0, plus)));
    if (found == addresses_.end()) refuse("no such operand: " + text);
    return found->second + (plus == string::npos ? 0 : value(trimmed(text.substr(plus + 1))));
  }
  // bytes: of its register, 0 if that is as it is; width: what they are.
  Operand operand(const string& text, int bytes, uint8_t* width = nullptr) {
    if (text == "_") return kNone;
    if (const Register* found = find_register(text)) {
      if (bytes && found->bytes != bytes) refuse(text + " is of " + std::to_string(found->bytes) + " bytes");
      if (width) *width = found->bytes;
      return found->place;
    }
    if (!bytes) bytes = 8;
    if (width) *width = bytes;
    return constant(bytes, value(text));
  }
  void address(Instruction& i, const string& text) {
    if (text[0] != '[') refuse("no address: " + text);
    const string inside = trimmed(text.substr(1, text.size() - 2));
    const size_t plus = inside.find('+');
    if (const Register* base = find_register(trimmed(inside.substr(0, plus)))) {
      i.s[0] = base->place, i.width[1] = base->bytes;
      if (plus != string::npos) i.offset = value(trimmed(inside.substr(plus + 1)));
    } else {
      i.offset = value(inside);
    }
  }

  // ---- instructions

  void push(Instruction& i) {
    i.line = kernel_.line + line_, i.text = statement_;
    kernel_.code.push_back(i);
  }
  void instruction() {
    Instruction i;
    string rest = statement_;
    if (rest[0] == '@') {
      const size_t end = rest.find(' ');
      i.guard_negated = rest[1] == '!';
      i.guard = operand(rest.substr(1 + i.guard_negated, end - 1 - i.guard_negated), 1);
      rest = trimmed(rest.substr(end));
    }
    const size_t end = rest.find(' ');
    const string name = rest.substr(0, end);
    const Words operands = end == string::npos ? Words() : split(rest.substr(end)), parts = split(name, '.');
    static const std::set<string> hints = {"prefetch", "prefetchu", "griddepcontrol", "createpolicy", "nanosleep"};
    const string& what = parts[0];
    if (hints.count(what)) return;
    if (what == "bra") {
      i.kind = Kind::kBranch;
      branches_.push_back({kernel_.code.size(), operands.at(0)});
    } else if (what == "ret" || what == "exit") {
      i.kind = Kind::kExit;
    } else if (name == "bar.warp.sync") {
      i.kind = Kind::kTogether;
      i.run = [](Warp&, const Instruction&, Mask) {};
      i.target = operand(operands.at(0), 4);
    } else if (what == "bar" || what == "barrier") {
      const bool aligned = name == "bar.sync" || name == "barrier.sync.aligned";  // all lanes of a warp at one of them
      if (!aligned || operands.size() != 1 || operands[0] != "0") refuse("a barrier of part of a block, or of lanes by themselves");
      i.kind = Kind::kBarrier;
    } else if (what == "fence" || what == "membar") {
      if (name == "membar.cta" || begins(name, "fence.proxy") || parts.back() == "cta") return;
      i.run = fence();
    } else if (what == "ld" || what == "ldu" || what == "st") {
      load_or_store(i, parts, operands);
    } else {
      of_the_table(i, name, parts, operands);
    }
    push(i);
  }
  Access access_of(const Words& parts) const {
    static const std::set<string> hints = {"weak", "nc", "ca", "cg", "cs", "cv", "lu", "wb", "wt", "gpu", "sys", "v2", "v4", "v8"};
    Access a;
    a.type = parts.back()[0], a.size = bytes_of(parts.back());
    if (!a.size) refuse("no such type");
    for (size_t k = 1; k + 1 < parts.size(); ++k) {
      const string& part = parts[k];
      if (begins(part, "shared"))
        a.space = Access::kShared;
      else if (begins(part, "param"))
        a.space = Access::kParameter;
      else if (part == "local")
        a.space = Access::kLocal;
      else if (part == "relaxed" || part == "volatile")
        a.order = Access::kRelaxed;
      else if (part == "acquire" || part == "release")
        a.order = Access::kOrdered;
      else if (part != "global" && !hints.count(part) && !begins(part, "L1::") && !begins(part, "L2::"))
        refuse("." + part);
    }
    return a;
  }
  void load_or_store(Instruction& i, const Words& parts, const Words& operands) {
    const bool loads = parts[0] != "st";
    const Access access = access_of(parts);
    const string& data = operands.at(loads ? 0 : 1);
    address(i, operands.at(loads ? 1 : 0));  // what may come behind is a cache policy
    const Words names = data[0] == '{' ? split(data.substr(1, data.size() - 2)) : Words{data};
    i.count = names.size();
    for (size_t k = 0; k < names.size(); ++k) {
      uint8_t width = 0;
      const bool number = !find_register(names[k]) && names[k] != "_";
      (loads ? i.d[k] : i.s[k + 1]) = operand(names[k], number ? std::max(access.size, 2) : 0, &width);
      if (width) i.width[0] = width;
    }
    i.flags = access.order;
    if (i.flags != Access::kWeak) i.kind = Kind::kOrdered;
    i.run = loads ? load(access, i.width[0]) : store(access, i.width[0]);
    if (!i.run) refuse("no such access");
  }
  void of_the_table(Instruction& i, string name, const Words& parts, const Words& operands) {
    Words results = split(operands.at(0), '|'), sources(operands.begin() + 1, operands.end());
    auto vector_of = [](const string& text) { return split(text.substr(1, text.size() - 2)); };
    if (parts[0] == "mov" && results[0][0] == '{') {
      results = vector_of(results[0]);
      name = "unpack" + std::to_string(results.size()) + "." + parts.back();
    } else if (parts[0] == "mov" && sources.at(0)[0] == '{') {
      sources = vector_of(sources[0]);
      name = "pack" + std::to_string(sources.size()) + "." + parts.back();
    } else if (parts[0] == "ldmatrix" || parts[0] == "stmatrix") {
      const bool loads = parts[0] == "ldmatrix";
      const Words registers = vector_of(operands.at(loads ? 0 : 1));
      address(i, operands[loads ? 1 : 0]);
      i.count = registers.size(), i.kind = Kind::kTogether, i.target = constant(4, kAll);
      for (size_t k = 0; k < registers.size(); ++k)
        (loads ? i.d[k] : i.s[k + 1]) = operand(registers[k], 4);
      results.clear(), sources.clear();
    }
    const auto found = opcodes().find(name);
    if (found == opcodes().end()) refuse("no such opcode");
    const Opcode& opcode = found->second;
    i.run = opcode.run, i.flags = opcode.flags;
    const int type = bytes_of(parts.back());
    for (size_t k = 0; k < results.size(); ++k)
      i.d[k] = operand(results[k], k && parts[0] == "shfl" ? 1 : opcode.result, &i.width[0]);
    for (size_t k = 0; k < sources.size(); ++k) {
      const bool number = !opcode.sources[0] && !find_register(sources[k]);
      i.s[k] = operand(sources[k], number ? type : opcode.sources[k], &i.width[1]);
    }
    if (parts[0] == "shfl") i.kind = Kind::kTogether, i.target = i.s[sources.size() - 1];
  }

  Kernel& kernel_;
  vector<Scope> scopes_;
  std::unordered_map<string, uint32_t> labels_, addresses_;
  std::map<std::pair<int, uint64_t>, uint32_t> constants_;
  vector<std::pair<size_t, string>> branches_;
  string statement_;
  int line_ = 0;
  bool sized_by_launch_ = false;  // whether there is shared memory that is
};

// ---- a module ------------------------------------------------------------------------------------------------------------------

std::unique_ptr<Kernel> kernel_of(const string& text, size_t entry, size_t& end) {
  auto kernel = std::make_unique<Kernel>();
  const size_t open = text.find('(', entry), close = closing(text, open, '(', ')'), body = text.find('{', close);
  kernel->name = trimmed(text.substr(entry + strlen(".entry"), open - entry - strlen(".entry")));
  for (string each : split(text.substr(open + 1, close - open - 1))) {
    for (char& c : each)
      if (is_space(c)) c = ' ';
    if (each.empty()) continue;
    const Variable found = declared(each.substr(strlen(".param ")), kernel->parameter_bytes);
    kernel->parameters.push_back({found.name, found.offset, found.size});
  }
  const string between = text.substr(close, body - close);  // .maxntid 128, .reqntid 128, 1, 1
  for (const char* limit : {".maxntid", ".reqntid"})
    if (const size_t at = between.find(limit); at != string::npos) {
      kernel->most_threads = 1;
      const size_t line = between.find('\n', at);
      for (const string& each : split(between.substr(at + strlen(limit), line - at - strlen(limit))))
        kernel->most_threads *= atoi(each.c_str());
    }
  end = closing(text, body, '{', '}');
  kernel->line = line_of(text, body);
  kernel->body = text.substr(body + 1, end - body - 1);
  return kernel;
}

}  // namespace

std::unique_ptr<Module> parse(const string& source) {
  const string text = without_comments(source);
  auto module = std::make_unique<Module>();
  string variables;  // of the module, declared before the kernels
  for (size_t at = 0; (at = text.find('.', at)) != string::npos; ++at) {
    if (at && !is_space(text[at - 1])) continue;
    if (begins(text, ".section", at)) {
      at = closing(text, text.find('{', at), '{', '}');
    } else if (begins(text, ".shared", at)) {  // a kernel that names variables of other spaces is refused
      const size_t end = text.find(';', at);
      variables += text.substr(at, end - at) + ";";
      at = end;
    } else if (begins(text, ".func", at)) {
      throw std::runtime_error("PTX not understood, line " + std::to_string(line_of(text, at)) + ": a function");
    } else if (begins(text, ".entry", at)) {
      auto kernel = kernel_of(text, at, at);
      kernel->module_variables = variables;
      module->kernels[kernel->name] = std::move(kernel);
    }
  }
  return module;
}

void parse_body(Kernel& kernel) {
  if (!kernel.code.empty()) return;
  Kernel parsed = kernel;  // of a body that is refused nothing stays
  Body(parsed).parse();
  parsed.body.clear();
  kernel = std::move(parsed);
}

}  // namespace ptx
