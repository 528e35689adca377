"""Simulation of a federation on a virtual clock: devices, links, delays, availability and faults around the real server.

Training is real, time is not: a task takes as many virtual seconds as the device model (`devices`, `delays`, or files of measured
devices) says, and clients come and go as `availability` and `faults` say. `simulation` is the driver that delivers events in order
of time. Nothing here decides what a server does, and a server cannot tell that it is simulated.
"""
