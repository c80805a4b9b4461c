"""The code location: definitions, jobs, the headless command. It wires the rooms together and computes nothing."""
