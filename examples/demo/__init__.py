"""The demo: a drawn pool with planted faults, an encoder trained on clean pairs, a truth table.

`pictures` draws and describes one picture, `out_of_domain` draws pictures from other domains, `pool` plants the faults
and writes the files, `train_encoder` and `train_captioner` train the models, `truth` reads the result, `sheet` shows
the pool on a page. `__main__` and `sieve` run the project. Nothing in the project imports this package.
"""
