"""The code location: definitions, sensors, resources, executor and command line. It computes nothing itself."""
