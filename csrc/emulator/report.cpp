#include "report.h"

#include <cxxabi.h>
#include <dlfcn.h>
#include <elf.h>
#include <link.h>

#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <map>
#include <mutex>
#include <vector>

namespace inception_ext::emulator {
namespace {

template <typename T>
std::vector<T> read_table(std::ifstream& file, uint64_t offset, uint64_t bytes) {
  std::vector<T> table(bytes / sizeof(T));
  file.seekg(static_cast<std::streamoff>(offset));
  file.read(reinterpret_cast<char*>(table.data()),
            static_cast<std::streamsize>(table.size() * sizeof(T)));
  return file ? table : std::vector<T>();
}

// The mangled name of the function `offset` bytes behind the load address of an ELF file, or "".
std::string symbol_at(const char* path, uint64_t offset) {
  std::ifstream file(path, std::ios::binary);
  const auto headers = read_table<ElfW(Ehdr)>(file, 0, sizeof(ElfW(Ehdr)));
  if (headers.empty()) return "";
  const auto& header = headers.front();
  const auto sections =
      read_table<ElfW(Shdr)>(file, header.e_shoff, header.e_shnum * sizeof(ElfW(Shdr)));
  for (const auto& section : sections) {
    if (section.sh_type != SHT_SYMTAB || section.sh_link >= sections.size()) continue;
    const auto& strings = sections[section.sh_link];
    const auto names = read_table<char>(file, strings.sh_offset, strings.sh_size);
    for (const auto& symbol : read_table<ElfW(Sym)>(file, section.sh_offset, section.sh_size)) {
      if ((symbol.st_info & 0xf) == STT_FUNC && symbol.st_value == offset &&
          symbol.st_name < names.size()) {
        return &names[symbol.st_name];
      }
    }
  }
  return "";
}

// "void a::(anonymous namespace)::kernel<float, 2>(a::Params, int)" -> "kernel<float, 2>"
std::string shorten(std::string name) {
  int depth = 0;
  size_t end = name.size();
  for (size_t i = name.size(); i-- > 0;) {  // the argument list: the last (...) at depth 0
    if (name[i] == ')' || name[i] == '>') ++depth;
    if (name[i] == '(' || name[i] == '<') --depth;
    if (name[i] == '(' && depth == 0) {
      end = i;
      break;
    }
  }
  name.resize(end);
  depth = 0;
  size_t begin = 0;
  for (size_t i = 0; i < name.size(); ++i) {
    if (name[i] == '<' || name[i] == '(') ++depth;
    if (name[i] == '>' || name[i] == ')') --depth;
    if (depth == 0 && (name[i] == ' ' || name[i] == ':')) begin = i + 1;
  }
  return name.substr(begin);
}

std::string look_up(const void* address) {
  Dl_info info = {};
  if (!dladdr(address, &info) || !info.dli_fname) return "a kernel without a name";
  std::string symbol;
  if (info.dli_saddr == address && info.dli_sname) symbol = info.dli_sname;
  if (symbol.empty()) {
    const auto offset =
        reinterpret_cast<uintptr_t>(address) - reinterpret_cast<uintptr_t>(info.dli_fbase);
    symbol = symbol_at(info.dli_fname, offset);
    // A file that is not position independent keeps absolute addresses.
    if (symbol.empty()) symbol = symbol_at(info.dli_fname, reinterpret_cast<uintptr_t>(address));
  }
  if (symbol.empty()) return "a kernel without a name";
  int status = 0;
  char* demangled = abi::__cxa_demangle(symbol.c_str(), nullptr, nullptr, &status);
  if (status == 0) symbol = demangled;
  std::free(demangled);
  return shorten(symbol);
}

}  // namespace

std::string function_name(const void* address) {
  static std::mutex mutex;
  static std::map<const void*, std::string> names;
  const std::lock_guard lock(mutex);
  auto [entry, missing] = names.try_emplace(address);
  if (missing) entry->second = look_up(address);
  return entry->second;
}

}  // namespace inception_ext::emulator
