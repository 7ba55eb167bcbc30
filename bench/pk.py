import json,sys,tempfile,time
from pathlib import Path
import torch
sys.path.insert(0,"bench")
import speed
from quaver.model.tts import TTS
from quaver.frame import Weights, persistent
import quaver.frame as qf
Graph=getattr(qf,"FrameGraph",None) or qf.Frame
from random_model import random_checkpoint
P=Path("tests/oracle/published")
which=sys.argv[1]; runs=[r.split(":") for r in sys.argv[2].split(",")]; out=sys.argv[3]
settings=json.loads((P/f"config-{which}-base.json").read_text()); codec=json.loads((P/"speech_tokenizer-config.json").read_text())
print(torch.cuda.get_device_name(), flush=True)
tmp=tempfile.mkdtemp()
shell=TTS.load(random_checkpoint(Path(tmp)/"shell",speed.shell_settings(settings),codec),device="cuda",dtype=torch.bfloat16)
torch.manual_seed(0)
def timed(step,n=150):
    for _ in range(5): step()
    e0,e1=(torch.cuda.Event(enable_timing=True) for _ in range(2))
    e0.record()
    for _ in range(n): step()
    e1.record(); torch.cuda.synchronize()
    return e0.elapsed_time(e1)/n
last=None
for kind,b,mode in runs:
    b=int(b)
    if kind!=last:
        w=tts=None; torch.cuda.empty_cache()
        tts=speed.random_tts(shell,settings)
        if kind!="bf16": speed.quantize_at_random(tts)
        w=Weights(tts); last=kind
    f=Graph(w,b,512,64) if "t" in mode else Graph.__new__(Graph)
    if "t" not in mode:
        cap=Graph._capture; Graph._capture=lambda self: None; f.__init__(w,b,512,64); Graph._capture=cap
    t=time.time(); k=persistent(f); print(kind,b,"persistent built",round(time.time()-t,1),flush=True)
    S=speed.Sampling
    for name,knobs in (("greedy",speed.GREEDY),("cold",speed.Knobs(S(0.05,50,0.95,1.05),S(0.05,50,0.9,1.0),2048)),("sampled",speed.SAMPLED)):
        pr=speed.prompts(tts,b)
        def join():
            for s,p in enumerate(pr): f.join(s,p,s,knobs.sampling,knobs.residual)
        s=f.slots
        if "t" in mode:
            join(); same=[]; errs=[]; firsts=[]
            st=[f._hidden,s.frame,s.past,s.alive,s.seen]
            for t in range(24):
                keep=[x.clone() for x in st]
                k(); torch.cuda.synchronize(); a=s.codes[t].clone(); h=f._hidden.float().clone()
                for x,y in zip(st,keep): x.copy_(y)
                f.step(); torch.cuda.synchronize(); c=s.codes[t].clone(); g=f._hidden.float()
                for r in range(b):
                    eq=(a[r]==c[r]); n=int((~eq).nonzero()[0]) if not eq.all() else 16
                    firsts.append(n)
                    if n==16: errs.append(((h[r]-g[r]).norm()/g[r].norm()).item())
            print(kind,b,name,"first difference",firsts,"hidden err",max(errs,default=None),s.frame.tolist(),s.past.tolist(),flush=True)
            join(); print(kind,b,name,"triton",round(timed(f.step),4),"ms",flush=True)
        join(); print(kind,b,name,"persistent",round(timed(k),4),"ms",flush=True)
    if "x" in mode:
        for block in (1,67):
            k=persistent(f,block); join()
            for _ in range(20): k()
            torch.cuda.synchronize()
            json.dump(k._tensors["trace"].tolist(),open(f"{out}/trace-{kind}-{b}-{block}.json","w"))
    f=k=None
