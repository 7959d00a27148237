import sys,time; sys.path.insert(0,'tests')
from measured import *
from distill.config import load
from distill.probe import *
from distill.meter import Meter
from distill.costs import parameters
from pathlib import Path
import tempfile
MID=("model={dim: 256, depth: 8, heads: 8, ffn_dim: 1024, channels: 16, text_dim: 64}","train.batch_size=1")
def go(r, o):
    rec=load(f"recipes/tiny/{r}.yaml", o)
    P=parameters(rec.model); m=Meter(); 
    fro=[r for r in ("teacher",*(["backbone"] if r.startswith("stage4") else []))]
    tr=list(dict.fromkeys(p.update for p in rec.phases)); 
    m.add("weights",4*P*(len(tr)+len(fro))); m.add("optimizer",8*P*len(tr)); m.add("EMA",4*P)
    t=time.process_time()
    simulate(rec, clip_of(rec.data), Machine(rec.train.precision=="bf16",False), m, lambda role: State(4*P), 3); t1=time.process_time()-t
    t=time.process_time()
    with tempfile.TemporaryDirectory() as d: real=measured_peak(rec, Path(d), 1)
    print(f"{r[:6]} {' '.join(o)[:60]:60} pred {m.total/1e6:8.1f} real {real/1e6:8.1f} ratio {m.total/real:.3f}", {k:round(v/1e6) for k,v in m.peak.items()}, f"{t1:.1f}s {time.process_time()-t:.1f}s", flush=True)
for r in sys.argv[1].split(","):
    for ck in ("false","true"):
        for pr in ("fp32","bf16"):
            go(r, (f"train.precision={pr}", f"model.checkpoint_blocks={ck}", "train.batch_size=2","model.depth=3"))
