"""Measures Loden's paths against the kernel's and against others', side by side on one machine (`loden bench`)."""
