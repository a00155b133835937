"""servd beside what a user would pick instead: same machine, weights and requests, in one go.

    python -m bench.peers.run                       # install what is missing, run all in turn, write the table

One file a peer (see `base.Peer`); adding one adds its rows. Nothing here knows servd's insides.
"""
