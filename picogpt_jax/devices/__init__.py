"""Devices: which there are, their mesh, processes, processors and chips."""
