// Writes to address 0: tests use it to see an illegal access surface as an error.
extern "C" __global__ void portable_fault() { *(volatile int*)0 = 1; }
