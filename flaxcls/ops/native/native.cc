// Everything that is compiled: one file an operator.
#include "convolution.h"
