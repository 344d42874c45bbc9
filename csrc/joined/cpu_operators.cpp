// Compiled as one: most of the time goes to torch's headers (setup.py).
#include "cpu/layer.cpp"
#include "cpu/pack.cpp"
#include "cpu/recurrence.cpp"
