"""The demo: a drawn pool with planted faults, an encoder taught by its clean pairs, a truth table.

`pictures` draws and describes one picture, `strange` draws what does not belong, `pool` plants the
faults and writes the files, `train_encoder` teaches the encoder, `truth` reads the result, `sheet`
shows the pool on a page. `__main__` runs the project on all of it and alone imports the project;
nothing in the project imports this package.
"""
