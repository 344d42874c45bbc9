// Compiled as one: most of the time goes to torch's headers (setup.py).
#include "autocast.cpp"
#include "autograd.cpp"
#include "layer_autograd.cpp"
