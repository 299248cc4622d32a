// What a newer GCC and glibc would import and glibc 2.28 with GCC 8's libstdc++ (manylinux_2_28) do not have, defined here instead.
#include <sstream>

// std::shared_ptr asks glibc (2.32 and newer) whether there is one thread only; "no" is always right.
extern "C" __attribute__((visibility("hidden"))) char __libc_single_threaded = 0;

// The default constructors of the string streams are exported since GLIBCXX_3.4.26 (GCC 9).
template std::basic_ostringstream<char>::basic_ostringstream();
template std::basic_stringstream<char>::basic_stringstream();
