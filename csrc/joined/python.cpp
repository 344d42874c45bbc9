// Compiled as one: most of the time goes to torch's and pybind11's headers (setup.py).
#include "python/bindings.cpp"
#include "python/direct_calls.cpp"
#include "python/module_options.cpp"
