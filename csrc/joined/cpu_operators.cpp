// Compiled as one: most of the time goes to torch's headers (setup.py).
#include "cpu/cell.cpp"
#include "cpu/layer_backward.cpp"
#include "cpu/layer_forward.cpp"
