"""The demo: a drawn pool with planted faults, an encoder taught by its clean pairs, a truth table.

`pictures` draws and describes one picture, `strange` draws what does not belong, `pool` plants the
faults and writes the files, `train_encoder` teaches the encoder, `truth` reads the result. The
rest of the project does not import this package, and this package does not import the project.
"""
