// What a newer GCC and glibc would import and glibc 2.28 with GCC 8's libstdc++ (manylinux_2_28) do not have, defined here instead.
#include <new>
#include <sstream>

// std::shared_ptr asks glibc (2.32 and newer) whether there is one thread only; "no" is always right.
extern "C" {
__attribute__((visibility("hidden"))) char __libc_single_threaded = 0;
}

// The default constructors of the string streams are exported since GLIBCXX_3.4.26 (GCC 9).
template std::basic_ostringstream<char>::basic_ostringstream();
template std::basic_stringstream<char>::basic_stringstream();

// std::vector calls this where a size is beyond all memory, since GLIBCXX_3.4.29 (GCC 11). By its name in the object file, since
// libstdc++ declares it with another visibility.
extern "C" [[noreturn]] __attribute__((visibility("hidden"))) void fastgen_bad_length() __asm__(
    "_ZSt28__throw_bad_array_new_lengthv");
void fastgen_bad_length() { throw std::bad_array_new_length(); }
