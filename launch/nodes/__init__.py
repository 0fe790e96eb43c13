"""A run on several machines: they meet in the run's folder, and go on with whatever is left of them.

agent.py       one machine's part: it starts, watches and ends its ranks as the leader says
leader.py      decisions of the one machine that leads: who takes part, what a failure means, when a machine may join
terms.py       files through which machines agree on who leads; they outlive any machine
wire.py        what machines say to each other
ranks.py       the processes of this machine
placement.py   the layout for each number of machines
"""
