# Owns the forwarding table as Python has it: whoever publishes a Fib keeps it alive while a pump may look into it.

from libc.stdint cimport uint32_t

from dataplane._fib_table cimport fib_table


cdef class Fib:
    cdef fib_table* table
    cdef object route(self, uint32_t at)
