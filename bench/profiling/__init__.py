"""The parts of bench/profile.py: spans, what is wrapped in each process, the account, its drawings.

The served code knows nothing of any of this: functions are replaced from outside, and only in a server started here.
"""
