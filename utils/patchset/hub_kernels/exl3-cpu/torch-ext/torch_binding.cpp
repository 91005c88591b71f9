// A Python module without contents: what the kernels export are plain C functions, which `kernels/cpu/calls.py` calls with ctypes.

#include "registration.h"

REGISTER_EXTENSION(TORCH_EXTENSION_NAME)
