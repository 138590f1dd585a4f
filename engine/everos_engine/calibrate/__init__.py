"""The descriptor experiment of `everos-engine fds calibrate`."""
