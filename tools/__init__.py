"""What developers run beside tests and benchmarks: machine code, wheels, the versions of other libraries."""
