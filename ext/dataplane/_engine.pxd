# Owns what an Engine consists of, for _rehearsal.pyx, which goes the pumps' ways without their threads.

from dataplane._fib cimport Fib
from dataplane._pump cimport engine_state
from dataplane._rx cimport rx_state
from dataplane._tap cimport TapSet
from dataplane._tx cimport tx_state


cdef class Engine:
    cdef engine_state* state
    cdef tx_state* tx
    cdef rx_state* rx
    cdef Fib fib
    cdef TapSet taps
    cdef list retired        # (generation in which it was replaced, table or set of taps)
    cdef retire(self, former)
