// Compiled as one: most of the time goes to torch's headers (setup.py).
#include "core/path_log.cpp"
#include "core/sequence.cpp"
#include "ops/cell.cpp"
#include "ops/composite_cell.cpp"
#include "ops/composite_layer.cpp"
#include "ops/layer.cpp"
#include "ops/lstm.cpp"
#include "ops/projected.cpp"
