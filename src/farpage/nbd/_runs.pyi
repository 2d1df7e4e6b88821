from farpage.nbd.runs import drop_sent as drop_sent
from farpage.nbd.runs import queue_runs as queue_runs
from farpage.nbd.runs import take_replies as take_replies
