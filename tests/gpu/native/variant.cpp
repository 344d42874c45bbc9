// The name of the kernels that bench_layer.cu is linked with.
extern const char* const kVariant;
const char* const kVariant = VARIANT;
