// Compiled as one: most of the time goes to torch's headers (setup.py).
#include "autograd/cell.cpp"
#include "autograd/layer.cpp"
#include "autograd/projected.cpp"
#include "autograd/recurrence.cpp"
#include "ops/autocast.cpp"
