// Compiled as one: most of the time goes to torch's and pybind11's headers (setup.py).
#include "bindings.cpp"
#include "direct_calls.cpp"
#include "module_options.cpp"
