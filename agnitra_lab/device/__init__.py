"""Device: a torch device in, facts out (DeviceInfo, GpuSample, DevicePeaks, the path of a C++ compiler).

Everything above stands on this folder, so that one place knows what the machine is and what it can do.
"""
