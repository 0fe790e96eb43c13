"""A run on several machines: they meet in the run's folder, and go on with whatever is left of them.

agent.py       one machine's part: it starts, watches and ends its ranks as the leader says
leader.py      decisions of the one machine that leads: who takes part, what a failure means, when a machine may join
leading.py     the leader's server, which answers the machines
admission.py   which machines it answers: of its own run, its version, its config
announcer.py   prints and keeps what the leader tells
memory.py      what has happened to the run, which every machine knows, so that any can lead
terms.py       files through which machines agree on who leads; they outlive any machine
lease.py       the counter that shows whether the leader lives
refusals.py    notes of machines that take no part
wire.py        requests and answers between a machine and the leader
addresses.py   where a machine is reached: its address, and a port that is kept free
part.py        what a machine is told of the run when it starts
ranks.py       the processes of this machine
placement.py   the layout for each number of machines
"""
