// Compiled as one: most of the time goes to torch's headers (setup.py).
#include "composite.cpp"
#include "layer_ops.cpp"
#include "lstm.cpp"
#include "ops.cpp"
#include "path_log.cpp"
