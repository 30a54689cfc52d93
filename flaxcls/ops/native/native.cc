// Everything that is compiled: one file an operator.
#include "batchnorm.h"
#include "convolution.h"
#include "pooling.h"
