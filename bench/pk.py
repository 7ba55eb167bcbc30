import json,sys,tempfile,time,copy
from pathlib import Path
import torch
sys.path.insert(0,"bench")
import speed
from quaver.model.tts import TTS
from quaver.frame import Frame, Weights, persistent
from random_model import random_checkpoint
P=Path("tests/oracle/published")
which=sys.argv[1]; kinds=sys.argv[2].split(","); batches=[int(b) for b in sys.argv[3].split(",")]; layers=int(sys.argv[4]) if len(sys.argv)>4 else 0
settings=json.loads((P/f"config-{which}-base.json").read_text()); codec=json.loads((P/"speech_tokenizer-config.json").read_text())
if layers: settings["talker_config"]["num_hidden_layers"]=layers
print(torch.cuda.get_device_name(), flush=True)
tmp=tempfile.mkdtemp()
shell=TTS.load(random_checkpoint(Path(tmp)/"shell",speed.shell_settings(settings),codec),device="cuda",dtype=torch.bfloat16)
for kind in kinds:
    tts=speed.random_tts(shell,settings)
    if kind=="int4": speed.quantize_at_random(tts)
    w=Weights(tts)
    for b in batches:
        t=time.time()
        torch.manual_seed(0)
        f=Frame(w,b,512,64); torch.cuda.synchronize(); print(kind,b,"triton built",round(time.time()-t,1),flush=True)
        t=time.time(); k=persistent(f); print("persistent built",round(time.time()-t,1),flush=True)
        for name,knobs in (("greedy",speed.GREEDY),("sampled",speed.SAMPLED)):
            pr=speed.prompts(tts,b)
            out={}
            for way,step in (("triton",f.step),("persistent",k)):
                for s,p in enumerate(pr): f.join(s,p,s,knobs.sampling,knobs.residual)
                h=[]
                for i in range(12):
                    step(); torch.cuda.synchronize(); h.append(f._hidden.float().clone())
                out[way]=(f.slots.codes[:12].clone(),h,f.slots.frame.tolist(),f.slots.past.tolist(),f.slots.alive.tolist())
            a,c=out["triton"],out["persistent"]
            same=(a[0]==c[0]).flatten(1).all(1)
            first=int((~same).nonzero()[0]) if not same.all() else 12
            print(kind,b,name,"same frames",first,"codes agree",round((a[0]==c[0]).float().mean().item(),3),"hidden err frame0",((a[1][0]-c[1][0]).norm()/a[1][0].norm()).item(),a[2:],c[2:],"stop",k._tensors["stops"][:3].flatten().tolist(),flush=True)
            if first==0: print(a[0][0].tolist(),c[0][0].tolist())
            for way,step in (("triton",f.step),("persistent",k)):
                for s,p in enumerate(pr): f.join(s,p,s,knobs.sampling,knobs.residual)
                for _ in range(5): step()
                e0,e1=(torch.cuda.Event(enable_timing=True) for _ in range(2))
                e0.record()
                for _ in range(150): step()
                e1.record(); torch.cuda.synchronize()
                print(kind,b,name,way,round(e0.elapsed_time(e1)/150,4),"ms",flush=True)
        if len(sys.argv)>5:
            k=persistent(f,1)
            for _ in range(3): k()
            torch.cuda.synchronize()
            json.dump(k._tensors["trace"].tolist(),open(f"{sys.argv[5]}/trace-{kind}-{b}.json","w"))
    del w,tts,f,k
