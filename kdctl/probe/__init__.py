"""Which precision, layout, threads and compilation are fastest on this machine: measured once, then remembered."""
